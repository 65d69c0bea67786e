"""Which tensors the kernels written by hand can read: dense ones, in the order of their memory."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

TOO_LARGE = 2**31 - 2**12  # elements are numbered in int32, to the end of the piece that a thread or a program computes
_OF_SCALES = (torch.float32, torch.float16, torch.bfloat16)


class Layout(NamedTuple):
    """A dense tensor as rows x positions x channels.

    A contiguous one has one position, and as many rows as scales; channels_last has all three.
    """

    memory: torch.memory_format
    per_row: bool  # the scale has one number for each row
    rows: int
    positions: int
    channels: int


def layout_of(
    x: Tensor, grid: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype, ...], *numbers: Tensor | None
) -> Layout | None:
    """Return how kernels see ``x``, or None if they do not serve it.

    Args:
        x: one of ``dtypes``.
        grid: the scale and what goes with it, of float32 or a half type, each one number, or one for each index of the first
            dimension.
        numbers: what else they read, from the same device.
    """
    if x.dtype not in dtypes or not 0 < x.numel() < TOO_LARGE:
        return None
    for other in (*grid, *numbers):
        if other is not None and (other.device != x.device or type(other) not in (Tensor, nn.Parameter)):
            return None
    scale = grid[0]
    assert scale is not None
    for part in grid:
        if part is not None and (part.shape != scale.shape or part.dtype not in _OF_SCALES or not part.is_contiguous()):
            return None
    per_row = scale.numel() != 1
    if scale.ndim > x.ndim or (per_row and not (scale.ndim == x.ndim and scale.numel() == scale.shape[0] == x.shape[0])):
        return None
    if x.is_contiguous():
        rows = x.shape[0] if per_row else 1
        return Layout(torch.contiguous_format, per_row, rows, 1, x.numel() // rows)
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if memory is None or not x.is_contiguous(memory_format=memory):
        return None
    rows, channels = x.shape[:2]
    return Layout(memory, per_row, rows, x.numel() // (rows * channels), channels)
