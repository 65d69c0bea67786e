"""``nn.MultiheadAttention`` and its function, written out: the projections and both products are edges of the graph."""

import math
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn


def additive_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask to add to scores: a bool mask becomes 0 and -inf (True means: may not look)."""
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def attention_mask(attn_mask: Tensor, scores: Tensor) -> Tensor:
    """Return ``attn_mask``, (L, S) or (N * heads, L, S), to add to scores (N, heads, L, S)."""
    mask = additive_mask(attn_mask, scores)
    return mask if mask.dim() == 2 else mask.view(scores.shape)


def padding_mask(key_padding_mask: Tensor, scores: Tensor) -> Tensor:
    """Return ``key_padding_mask``, (N, S), to add to scores (N, heads, L, S)."""
    return additive_mask(key_padding_mask, scores)[:, None, None, :]


def check_batched(query: Tensor) -> Tensor:
    """Return ``query``; attention without a batch dimension is not supported."""
    if query.dim() != 3:
        raise ValueError(f"attention got a query of shape {tuple(query.shape)}: add a batch dimension.")
    return query


for _function in ("attention_mask", "padding_mask", "check_batched"):
    torch.fx.wrap(_function)


class ExplicitAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` in operations that a tracer sees; no fused or fast path. Same parameters, same results."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        one_weight = self.kdim == self.vdim == self.embed_dim
        separate = None if one_weight else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        projected = _project(query, key, value, self.embed_dim, self.in_proj_weight, self.in_proj_bias, separate)
        mixed, weights = _attend(
            projected, self.num_heads, self.head_dim, self.batch_first, self.dropout, self.training, attn_mask, key_padding_mask
        )
        out = F.linear(mixed, self.out_proj.weight, self.out_proj.bias)
        if not need_weights:
            return out, None
        return out, weights.mean(1) if average_attn_weights else weights


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """``F.multi_head_attention_forward`` in operations that a tracer sees; ``NotImplemented`` for its rare options."""
    rare = (bias_k, bias_v, static_k, static_v)
    if add_zero_attn or any(value is not None for value in rare) or (is_causal and attn_mask is None):
        return NotImplemented
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    projected = _project(query, key, value, embed_dim_to_check, in_proj_weight, in_proj_bias, separate)
    width = embed_dim_to_check // num_heads
    mixed, weights = _attend(projected, num_heads, width, False, dropout_p, training, attn_mask, key_padding_mask)
    out = F.linear(mixed, out_proj_weight, out_proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def _project(
    query: Tensor, key: Tensor, value: Tensor, width: int, weight: Any, bias: Tensor | None, separate: tuple[Any, ...] | None
) -> list[Tensor]:
    """The three projections; self-attention with one weight takes one product with it as it is stored."""
    parts = [slice(i * width, (i + 1) * width) for i in range(3)]
    if separate is None and query is key and key is value:
        joined = F.linear(check_batched(query), weight, bias)
        return [joined[..., part] for part in parts]
    weights = separate or [weight[part] for part in parts]
    biases = [None if bias is None else bias[part] for part in parts]
    return [F.linear(x, w, b) for x, w, b in zip((check_batched(query), key, value), weights, biases, strict=True)]


def _attend(
    projected: list[Tensor],
    heads: int,
    width: int,
    batch_first: bool,
    dropout: float,
    training: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of what was projected, in the layout of the inputs, and its weights (N, heads, L, S)."""
    if not batch_first:
        projected = [part.transpose(0, 1) for part in projected]
    q, k, v = (torch.unflatten(part, -1, (heads, width)).transpose(1, 2) for part in projected)
    scores = torch.matmul(q * width**-0.5, k.transpose(-2, -1))
    if attn_mask is not None:
        scores = scores + attention_mask(attn_mask, scores)
    if key_padding_mask is not None:
        scores = scores + padding_mask(key_padding_mask, scores)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout, training)
    mixed = torch.matmul(weights, v).transpose(1, 2).flatten(-2)
    return mixed if batch_first else mixed.transpose(0, 1), weights


def can_be_explicit(module: nn.MultiheadAttention) -> bool:
    """Extra key and value biases (``add_bias_kv``, ``add_zero_attn``) are not written out."""
    return module.bias_k is None and not module.add_zero_attn
