"""The order of dimensions in which a tensor lies in memory: channels_last is one. Files hold values row by row, and say it."""

from collections.abc import Sequence

from torch import Tensor


def order_of(value: Tensor) -> list[int] | None:
    """Return the dimensions from the slowest to the fastest; None for a contiguous tensor, or one with overlaps or gaps."""
    if value.is_contiguous():
        return None
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda dim: (-strides[dim], dim))
    return order if value.permute(order).is_contiguous() else None


def laid_out(value: Tensor, order: Sequence[int]) -> Tensor:
    """Return the same values in memory in this order of dimensions.

    Raises:
        ValueError: if that is no order of its dimensions.
    """
    if sorted(order) != list(range(value.ndim)):
        raise ValueError(f"{list(order)} is no order of {value.ndim} dimensions")
    return value.permute(*order).contiguous().permute(*(order.index(dim) for dim in range(value.ndim)))
