"""Operations that keep no fake-quantized operand for backward: y is made again there, from the x_c that is kept anyway.

Each has the name, the arguments and the result of torch's own. Bytes kept for backward are those of float training then, for
one more run of the quantizer; gradients are the same, bit for bit, since a mask is a function of its key.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pege_fx.numerics.discretizer import made_again, node_to_make_again


class _Recipe(NamedTuple):
    """What stands for y, or for a view of it, until backward."""

    node: Any  # of the discretizer that made y; it keeps x_c
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any

    def followed(self) -> Tensor:
        return made_again(self.node).as_strided(self.size, self.stride, self.offset)


def _unpacked(kept: Tensor | _Recipe) -> Tensor:
    return kept.followed() if isinstance(kept, _Recipe) else kept


def _remaking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` without what autograd would keep of operands that can be made again."""

    @functools.wraps(function, assigned=("__name__",))
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler decides what to keep; see FakeQuant
            return function(*args, **kwargs)
        tensors = [y for y in (*args, *kwargs.values()) if isinstance(y, Tensor)]
        # Their nodes, and not the tensors: autograd keeps the function below.
        made_by = [(y, node) for y in tensors if (node := node_to_make_again(y)) is not None]
        nodes = {y.untyped_storage().data_ptr(): node for y, node in made_by}
        if not nodes:
            return function(*args, **kwargs)

        def pack(kept: Tensor) -> Tensor | _Recipe:
            node = nodes.get(kept.untyped_storage().data_ptr())
            return kept if node is None else _Recipe(node, kept.size(), kept.stride(), kept.storage_offset())

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpacked):
            return function(*args, **kwargs)

    call.__module__, call.__qualname__ = __name__, call.__name__
    call.__doc__ = f"Return what torch's ``{call.__name__}`` does; quantized operands are made again in backward."
    return call


@functools.cache
def variant_of(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the variant of a function of torch, made once; None for others, as code finds a variant by torch's name here."""
    name = getattr(function, "__name__", "")
    return _remaking(function) if _function_of_torch(name) is function else None


def original_of(function: Any) -> Any:
    """Return the function of torch that a variant is of, or what is given."""
    is_variant = getattr(function, "__module__", None) == __name__ and hasattr(function, "__wrapped__")
    return function.__wrapped__ if is_variant else function


def _function_of_torch(name: str) -> Any:
    return getattr(F, name, None) or getattr(torch, name, None)


def __getattr__(name: str) -> Any:
    """``recompute.conv2d``, as the code of a graph says it: the variant of torch's function of that name."""
    function = None if name.startswith("__") else _function_of_torch(name)
    variant = None if function is None else variant_of(function)
    if variant is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return variant
