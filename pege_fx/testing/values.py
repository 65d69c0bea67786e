"""Strategies for tensors, number formats and policies."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

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


def specs(**fixed: Any) -> st.SearchStrategy[QuantSpec]:
    """Number formats over every field; ``specs(method="lsq", granularity="tensor")`` takes those as they are.

    Raises:
        SpecError, TypeError: if a fixed field does not exist or has a wrong value, at once.
    """
    QuantSpec(**{"bits": MAX_BITS} | fixed)
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "bits": st.integers(MIN_BITS, MAX_BITS),
        "signed": st.sampled_from([None, True, False]),
        "granularity": st.sampled_from(["channel", "tensor"]),
        "narrow": st.booleans(),
        "method": st.sampled_from(["lsq", "pact", "dorefa", "interval", "minmax"]),
        "estimator": st.sampled_from(["pege", "ste", "ewgs", "pege-relative", "pege-share"]),
    }
    fields = st.fixed_dictionaries(drawn | {name: st.just(value) for name, value in fixed.items()})
    return fields.filter(lambda f: not (f["narrow"] and f["signed"] is False)).map(lambda f: QuantSpec(**f))


@st.composite
def policies(draw: st.DrawFn, /, **fixed: Any) -> QuantPolicy:
    """A default rule, and sometimes float or eight bits for the first and the last operation; ``fixed`` as for ``specs``."""
    weight = draw(specs(**fixed))
    activation = draw(specs(**fixed | {"granularity": "tensor"}))
    rules = [Rule(weight=weight, input=draw(st.sampled_from([activation, None])))]
    for role in ("first", "last"):
        if (setting := draw(st.sampled_from(["leave", "8", None]))) != "leave":
            rules.append(Rule(role=role, weight=setting, input=setting))
    return QuantPolicy(tuple(rules))
