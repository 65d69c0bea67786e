"""``ExplicitAttention`` gives what ``nn.MultiheadAttention`` gives, and shows the tracer all of it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx.attention import ExplicitAttention
from pege_fx.explicit import make_explicit

L, N = 5, 3


def masks(name: str) -> dict[str, Any]:
    causal = torch.triu(torch.ones(L, L, dtype=torch.bool), 1)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[:, -1] = True
    return {
        "none": {},
        "without weights": {"need_weights": False},
        "per head": {"average_attn_weights": False},
        "bool mask": {"attn_mask": causal},
        "float mask": {"attn_mask": torch.zeros(L, L).masked_fill(causal, -1e4)},
        "mask per head": {"attn_mask": causal.expand(N * 2, L, L)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
    }[name]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "case", ["none", "without weights", "per head", "bool mask", "float mask", "mask per head", "padding", "both"]
)
def test_it_gives_what_torch_gives(batch_first: bool, kdim: int | None, bias: bool, case: str) -> None:
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim, bias=bias).eval()
    explicit = copy.deepcopy(fused)
    make_explicit(explicit)
    query, other = torch.randn(N, L, 8), torch.randn(N, L, kdim or 8)
    if not batch_first:
        query, other = query.transpose(0, 1), other.transpose(0, 1)
    for inputs in [(query, other, other), *([(query, query, query)] if kdim is None else [])]:
        want, got = fused(*inputs, **masks(case)), explicit(*inputs, **masks(case))
        torch.testing.assert_close(got[0], want[0])
        assert (got[1] is None) == (want[1] is None)
        if want[1] is not None:
            torch.testing.assert_close(got[1], want[1])
    assert type(explicit) is ExplicitAttention
    assert set(explicit.state_dict()) == set(fused.state_dict())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return out


def test_projections_and_both_products_are_quantized() -> None:
    model, x = Block(), torch.randn(2, 5, 8)
    gm = pege_fx.prepare(model, pege_fx.QuantPolicy.parse("W4A4", first="4", last="4"), (x,))
    edges = {(op.path, edge.operand): edge.spec for op in gm.meta["plan"].operations for edge in op.edges}
    assert {operand for _, operand in edges} == {"weight", "input", "other"}
    assert len(edges) == 8
    assert all(spec is not None for spec in edges.values())
    assert edges["attention.matmul_1", "input"].signed is False  # behind a softmax
    gm.eval()
    with torch.no_grad():
        assert torch.equal(pege_fx.convert(gm)(x), gm(x))
    assert type(model.attention) is nn.MultiheadAttention


def test_extra_biases_leave_it_as_it_is_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 8), _Self(nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)))
    explanation = pege_fx.explain(model, "W4A4", (torch.randn(2, 5, 8),))
    assert "MultiheadAttention is not among" in explanation["1.attention"].reason


class _Self(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


def test_a_query_without_batch_is_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)
    make_explicit(attention)
    x = torch.randn(5, 8)
    with pytest.raises(ValueError, match="add a batch dimension"):
        attention(x, x, x)
