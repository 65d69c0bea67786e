"""How a kernel that is compiled locally sees a dense tensor."""

from typing import NamedTuple

import torch
from torch import Tensor


class CompiledView(NamedTuple):
    """A dense tensor as a compiled kernel sees it: flat, one row per scale, or (batch, positions, channels)."""

    shape: tuple[int, ...]
    order: tuple[int, ...] | None  # permutation that makes the memory contiguous
    scale_shape: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:
        # ``data``: the compiler would guard on the base of a view, and compile anew for each.
        return (x if self.order is None else x.permute(self.order)).reshape(self.shape).data

    def of_scale(self, scale: Tensor) -> Tensor:
        return scale.reshape(self.scale_shape).data

    def of_scales(self, *scales: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if scale is None else self.of_scale(scale) for scale in scales)

    def back(self, y: Tensor, like: Tensor) -> Tensor:
        if self.order is None:
            return y.view(like.shape)
        shape = [like.shape[i] for i in self.order]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return y.view(shape).permute(inverse)


def view_of(x: Tensor, scale: Tensor, *others: Tensor | None) -> CompiledView | None:
    """Return how a compiled kernel may see ``x`` without a copy, or None."""
    if any(other is not None and other.numel() != scale.numel() for other in others):
        return None
    if scale.numel() == 1:
        if x.is_contiguous():
            return CompiledView((-1,), None, ())
        if x.ndim == 4 and min(x.shape) > 1 and x.is_contiguous(memory_format=torch.channels_last):
            return CompiledView((x.shape[0], -1, x.shape[1]), (0, 2, 3, 1), ())
    elif x.is_contiguous() and scale.ndim == x.ndim and scale.numel() == scale.shape[0] == x.shape[0] < x.numel():
        return CompiledView((x.shape[0], -1), None, (-1, 1))
    return None
