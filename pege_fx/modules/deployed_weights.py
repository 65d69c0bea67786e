"""What weights are in evaluation, computed once and kept until something that they depend on changes."""

import weakref
from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pege_fx.kernels.inductor import has_memory
from pege_fx.modules.batch_norm import Fold
from pege_fx.modules.forward_method import ForwardMethod
from pege_fx.numerics.layouts import Channels, Tiling
from pege_fx.numerics.spec import QuantSpec


class _Deployed(NamedTuple):
    """What a weight is in evaluation, and what it was made from: aliases, so that no address is used again, with versions."""

    decisions: tuple[Any, ...]
    sources: list[tuple[Tensor, int]]
    value: Tensor

    def is_of(self, decisions: tuple[Any, ...], sources: list[tuple[Tensor, int]]) -> bool:
        return decisions == self.decisions and all(
            now == before and a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
            for (a, now), (b, before) in zip(sources, self.sources, strict=True)
        )


_DEPLOYED: "weakref.WeakKeyDictionary[nn.Module, _Deployed]" = weakref.WeakKeyDictionary()


def forget(site: nn.Module) -> None:
    """Drop what is kept of a site."""
    _DEPLOYED.pop(site, None)


def deployed_once(
    site: nn.Module, weight: Tensor, method: ForwardMethod, fold: Fold | None, compute: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return ``compute(weight)``, anew when something that it depends on has changed since."""
    settings = _settings_of(method)
    if settings is None or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not has_memory(weight):
        return compute(weight)
    norm, folded = ((), ()) if fold is None else (fold.tensors, (fold.live, fold.bn.eps))
    tensors = (weight, *norm, *method.parameters(), *method.buffers())
    try:
        sources = [(t.detach(), t._version) for t in tensors if t is not None]
        decisions = (method, settings, folded, len(sources))
        known = _DEPLOYED.get(site)
        if known is None or not known.is_of(decisions, sources):
            with torch.inference_mode(mode=False), torch.no_grad():
                known = _DEPLOYED[site] = _Deployed(decisions, sources, compute(weight))
    except RuntimeError:  # tensors of inference mode have no version, those under vmap no memory of their own
        return compute(weight)
    return known.value


_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_FIXED = (bool, int, float, str, NoneType, torch.dtype, torch.device, QuantSpec, Channels, Tiling)


def _settings_of(method: ForwardMethod) -> tuple[Any, ...] | None:
    """What a method's grid may depend on beside its tensors; None if some of it may change without anybody noticing."""
    held = [(name, value) for part in method.modules() for name, value in vars(part).items() if name not in _OF_EVERY_MODULE]
    is_fixed = all(
        isinstance(value, _FIXED) or (type(value) is tuple and all(isinstance(item, _FIXED) for item in value))
        for _, value in held
    )
    return tuple(held) if is_fixed else None
