"""Strategies for tensors, number formats and policies."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pege_fx.errors import SpecError
from pege_fx.numerics.spec import MAX_BITS, MIN_BITS, QuantSpec
from pege_fx.policy.rules import QuantPolicy, Rule

_FILLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "ties": lambda x: (x * 8).round() / 2,  # halfway between the codes of a grid of step 1
    "normal": lambda x: x,
    "small": lambda x: x * 1e-3,
    "large": lambda x: x * 1e3,
}
_HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda x: torch.where(x > 1, torch.nan, x),
    "infinite": lambda x: torch.where(x.abs() > 1, x.sign() * torch.inf, x),
    "denormal": lambda x: x * torch.finfo(x.dtype).smallest_normal,
    "huge": lambda x: x.sign() * torch.finfo(x.dtype).max * x.abs().clamp(max=1.0),
}


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    max_side: int = 6,
    *,
    hostile: bool = False,
) -> Tensor:
    """Tensors of a given shape, or of one to four dimensions: all zeros, all ones, ties, random at three sizes.

    Args:
        shape: of the tensor; default: one to four sides of 1 to ``max_side``.
        dtype: floating point.
        hostile: also with NaN, with infinities, denormal, and as large as the dtype goes; else everything is finite.
    """
    if shape is None:
        shape = draw(st.lists(st.integers(1, max_side), min_size=1, max_size=4))
    fillings = _FILLINGS | (_HOSTILE if hostile else {})
    filling = draw(st.sampled_from([*fillings]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return fillings[filling](torch.randn(tuple(shape), generator=generator).to(dtype))


_WHOLE = {
    "bits": st.integers(MIN_BITS, MAX_BITS),
    "signed": st.sampled_from([None, True, False]),
    "granularity": st.sampled_from(["channel", "tensor"]),
    "narrow": st.booleans(),
    "method": st.sampled_from(["lsq", "pact", "dorefa", "interval", "minmax"]),
    "estimator": st.sampled_from(["pege", "ste", "ewgs", "pege-relative"]),
}
_LAYOUTS = st.sampled_from(["channel", "tensor", "group-3-pad", "group-4-pad"])
_OTHERS: tuple[dict[str, st.SearchStrategy[Any]], ...] = (
    {"bits": st.integers(MIN_BITS, MAX_BITS), "method": st.sampled_from(["lsq", "minmax", "dynamic", "absmean", "lsq+"])},
    {"bits": st.integers(MIN_BITS, MAX_BITS), "signed": st.booleans(), "method": st.just("dynamic-asymmetric")},
    {
        "format": st.sampled_from(["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "nf4", "seq2", "binary", "levels(-2,-1,0,3)"]),
        "method": st.sampled_from(["lsq", "minmax", "dynamic", "absmean"]),
    },
    {"format": st.just("ternary"), "method": st.sampled_from(["lsq", "absmean", "twn"])},
)
_BLOCKS = st.sampled_from(["group-3-pad", "group-4-pad"])
_STANDARDS: tuple[dict[str, st.SearchStrategy[Any]], ...] = (
    {"format": st.sampled_from(["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"]), "method": st.just("mx"), "granularity": _BLOCKS},
    {"format": st.just("e2m1"), "method": st.just("nvfp4"), "granularity": _BLOCKS},
)


def specs(*, every_format: bool = False, **fixed: Any) -> st.SearchStrategy[QuantSpec]:
    """Specs over every field; ``specs(method="lsq", granularity="tensor")`` takes those as they are.

    Args:
        every_format: not only whole numbers per tensor and channel, which every file and engine takes, but floats, lists of
            levels, ternary, MX and NVFP4, over groups too, with learned, observed and dynamic scales. For weights.
        fixed: fields of ``QuantSpec``.

    Raises:
        SpecError, TypeError: if a fixed field does not exist or has a wrong value, at once.
    """
    QuantSpec(**({} if "format" in fixed else {"bits": MAX_BITS}) | fixed)
    others = [{"granularity": _LAYOUTS} | fields for fields in _OTHERS] + [*_STANDARDS] if every_format else []
    drawn = [_WHOLE, *({"estimator": _WHOLE["estimator"]} | fields for fields in others)]
    chosen = [fields | {name: st.just(value) for name, value in fixed.items()} for fields in drawn]
    return st.one_of([st.fixed_dictionaries(fields).filter(_go_together).map(_spec) for fields in chosen])


def _go_together(fields: dict[str, Any]) -> bool:
    try:
        _spec(fields)
    except SpecError:
        return False
    return True


def _spec(fields: dict[str, Any]) -> QuantSpec:
    return QuantSpec(**fields)


@st.composite
def policies(draw: st.DrawFn, /, *, every_format: bool = False, **fixed: Any) -> QuantPolicy:
    """A default rule, and sometimes float or eight bits for the first and the last operation; arguments as for ``specs``."""
    weight = draw(specs(every_format=every_format, **fixed))
    activation = draw(specs(**fixed | {"granularity": "tensor"}))
    rules = [Rule(weight=weight, input=draw(st.sampled_from([activation, None])))]
    for role in ("first", "last"):
        if (setting := draw(st.sampled_from(["leave", "8", None]))) != "leave":
            rules.append(Rule(role=role, weight=setting, input=setting))
    return QuantPolicy(tuple(rules))
