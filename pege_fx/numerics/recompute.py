"""Operations that keep no fake-quantized operand for backward: y is made again there, from the x_c that is kept anyway.

Each has the name, the arguments and the result of torch's own. Bytes kept for backward are those of float training then, for
one more run of the quantizer; gradients are the same, bit for bit, since a mask is a function of its key.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pege_fx.numerics.functional import can_be_made_again, made_again


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
        nodes = {y.untyped_storage().data_ptr(): y.grad_fn for y in tensors if can_be_made_again(y)}
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


conv1d = _remaking(F.conv1d)
conv2d = _remaking(F.conv2d)
conv3d = _remaking(F.conv3d)
conv_transpose1d = _remaking(F.conv_transpose1d)
conv_transpose2d = _remaking(F.conv_transpose2d)
conv_transpose3d = _remaking(F.conv_transpose3d)
linear = _remaking(F.linear)
bilinear = _remaking(F.bilinear)
embedding = _remaking(F.embedding)
embedding_bag = _remaking(F.embedding_bag)
matmul = _remaking(torch.matmul)
mm = _remaking(torch.mm)
bmm = _remaking(torch.bmm)
addmm = _remaking(torch.addmm)
baddbmm = _remaking(torch.baddbmm)
grouped_mm = _remaking(F.grouped_mm)
einsum = _remaking(torch.einsum)
scaled_dot_product_attention = _remaking(F.scaled_dot_product_attention)
mul = _remaking(torch.mul)

REMAKING: dict[Any, Callable[..., Any]] = {
    F.conv1d: conv1d,
    F.conv2d: conv2d,
    F.conv3d: conv3d,
    F.conv_transpose1d: conv_transpose1d,
    F.conv_transpose2d: conv_transpose2d,
    F.conv_transpose3d: conv_transpose3d,
    F.linear: linear,
    F.bilinear: bilinear,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    torch.matmul: matmul,
    torch.mm: mm,
    torch.bmm: bmm,
    torch.addmm: addmm,
    torch.baddbmm: baddbmm,
    F.grouped_mm: grouped_mm,
    torch.einsum: einsum,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    torch.mul: mul,
    operator.matmul: matmul,
    operator.mul: mul,
}
