"""``nn.MultiheadAttention`` written out, so that its projections and both of its products are edges of the graph."""

import math

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
        q, k, v = self._project(query, key, value)
        if not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = (torch.unflatten(part, -1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in (q, k, v))
        scores = torch.matmul(q * self.head_dim**-0.5, k.transpose(-2, -1))
        if attn_mask is not None:
            scores = scores + attention_mask(attn_mask, scores)
        if key_padding_mask is not None:
            scores = scores + padding_mask(key_padding_mask, scores)
        weights = F.dropout(F.softmax(scores, dim=-1), self.dropout, self.training)
        mixed = torch.matmul(weights, v).transpose(1, 2).flatten(-2)
        if not self.batch_first:
            mixed = mixed.transpose(0, 1)
        out = F.linear(mixed, self.out_proj.weight, self.out_proj.bias)
        if not need_weights:
            return out, None
        return out, weights.mean(1) if average_attn_weights else weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The three projections; self-attention takes one product with the weight as it is stored."""
        parts = [slice(i * self.embed_dim, (i + 1) * self.embed_dim) for i in range(3)]
        one_weight = self.kdim == self.vdim == self.embed_dim
        if one_weight and query is key and key is value:
            joined = F.linear(check_batched(query), self.in_proj_weight, self.in_proj_bias)
            return [joined[..., part] for part in parts]
        if one_weight:
            weights = [self.in_proj_weight[part] for part in parts]
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        biases = [None if self.in_proj_bias is None else self.in_proj_bias[part] for part in parts]
        inputs = (check_batched(query), key, value)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def can_be_explicit(module: nn.MultiheadAttention) -> bool:
    """Extra key and value biases (``add_bias_kv``, ``add_zero_attn``) are not written out."""
    return module.bias_k is None and not module.add_zero_attn
