"""Embedding bags in operations that ONNX has: it has no bags."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pege_fx.errors import ExportError


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: Literal["sum", "mean", "max"] = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Do what ``torch.nn.functional.embedding_bag`` does: rows of a matrix, reduced bag by bag.

    Args:
        input: indices, (bags, length), or (indices,) with ``offsets``.
        weight: (rows, features).

    Returns:
        (bags, features); an empty bag is zero.

    Raises:
        ExportError: with ``max_norm``, which changes the weight.
    """
    if max_norm is not None:
        raise ExportError("an embedding bag with max_norm changes its weight when it runs: renormalize the weight before.")
    rows = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if input.ndim == 1:
        assert offsets is not None  # or torch had refused the call
        member = _members(input.shape[0], offsets, include_last_offset)
        rows = rows.unsqueeze(0)
    else:
        member = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        member = member & (input != padding_idx % weight.shape[0])
    counted = member.to(rows.dtype)
    sizes = counted.sum(1, keepdim=True)
    if mode == "max":
        known = rows.masked_fill(~member.unsqueeze(-1), -math.inf)
        known = F.pad(known, (0, 0, 0, 1), value=-math.inf)  # there is no largest of nothing
        return known.amax(1).masked_fill(sizes == 0, 0.0)
    total = torch.matmul(counted.unsqueeze(1), rows).squeeze(1)
    return total / sizes.clamp(min=1) if mode == "mean" else total


def _members(count: int, offsets: Tensor, include_last_offset: bool) -> Tensor:
    """Tell which of ``count`` indices lie in which bag: (bags, count)."""
    places = torch.arange(count, device=offsets.device)
    starts = offsets[:-1] if include_last_offset else offsets
    ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_full((1,), count)])
    return (places >= starts.unsqueeze(1)) & (places < ends.unsqueeze(1))
