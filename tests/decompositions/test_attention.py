"""``ExplicitAttention`` gives what ``nn.MultiheadAttention`` gives, and shows the tracer all of it."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx.decompositions.attention import ExplicitAttention
from pege_fx.decompositions.decompose import decompose_modules

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
    decompose_modules(explicit)
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


class Pool(nn.Module):
    """As CLIP and WavLM have it: the function itself, with projections that are layers."""

    def __init__(self, joined: bool, query: int | None, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
        self.in_proj = nn.Parameter(torch.randn(24, 8)) if joined else None
        self.joined, self.query, self.options = joined, query, options

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        separate = {"use_separate_proj_weight": True} | {
            f"{name}_weight": getattr(self, name).weight for name in ("q_proj", "k_proj", "v_proj")
        }
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        head = (x if self.query is None else x[: self.query], x, x, 8, 2, self.in_proj, bias, None, None)
        rare = self.options.get("add_zero_attn", False)
        tail = (rare, 0.0, self.out_proj.weight, self.out_proj.bias)
        options = {name: value for name, value in self.options.items() if name != "add_zero_attn"}
        found: tuple[Tensor, Tensor | None] = F.multi_head_attention_forward(
            *head, *tail, training=self.training, **({} if self.joined else separate), **options
        )
        return found


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("query", [None, 1])
@pytest.mark.parametrize("case", ["none", "without weights", "per head", "padding", "bool mask", "mask per head"])
def test_the_function_is_written_out_where_it_is_called(joined: bool, query: int | None, case: str) -> None:
    options = masks(case)
    if query and "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"][..., :query, :]
    model, x = Pool(joined, query, options).eval(), torch.randn(L, N, 8)
    gm = pege_fx.prepare(model, pege_fx.QuantPolicy.parse("W4A4", first="4", last="4"), (x,))
    weights = [edge for op in gm.meta["plan"].operations for edge in op.weights if edge.spec is not None]
    assert len(weights) >= (2 if joined and query is None else 4)
    assert sum(op.function == "matmul" for op in gm.meta["plan"].operations) == 2
    with torch.no_grad():
        torch.testing.assert_close(pege_fx.convert(gm)(x), gm(x), rtol=0, atol=0)
        for site in pege_fx.fake_quants(gm).values():
            site.schedule.rate.fill_(0.0)
        torch.testing.assert_close(gm.train()(x), model.train()(x))


def test_the_functions_rare_options_stay_as_they_are() -> None:
    model, x = Pool(False, None, {"add_zero_attn": True}).eval(), torch.randn(L, N, 8)
    with pytest.warns(pege_fx.PegeWarning, match="nothing is quantized"):
        gm = pege_fx.prepare(model, "W4A4", (x,))
    torch.testing.assert_close(gm(x), model(x))


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
    decompose_modules(attention)
    x = torch.randn(5, 8)
    with pytest.raises(ValueError, match="add a batch dimension"):
        attention(x, x, x)
