"""einops: its functions and layers stay whole in the graph, its einsum becomes torch's, whose operands are quantized."""

import copy
import pickle
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx import QuantPolicy, Rule
from pege_fx.passes.capture.einops_calls import letters
from pege_fx.training.scheduler import plan_of

pytest.importorskip("einops")
import einops
from einops import einsum, pack, rearrange, reduce, repeat, unpack
from einops.layers.torch import Rearrange

X = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Every function of einops, by both ways to import it, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.to_image, self.conv = Rearrange("b (h w) c -> b c h w", h=4), nn.Conv2d(8, 8, 3, padding=1)
        self.token, self.to_qkv = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 24)
        self.out = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.conv(self.to_image(x)).relu(), "b c h w -> b (h w) c")
        token = repeat(self.token, "1 1 d -> b 1 d", b=x.shape[0])
        tokens, sizes = pack([token, tokens], "b * d")
        q, k, v = (einops.rearrange(t, "b n (h d) -> b h n d", h=2) for t in self.to_qkv(tokens).chunk(3, -1))
        shares = einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1)
        heads = rearrange(einsum(shares, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)")
        _, tokens = unpack(heads, sizes, "b * d")
        return einsum(reduce(tokens, "b n d -> b d", "mean"), self.out, "batch i, i o -> batch o")


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention()


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")  # three chunks
def test_everything_is_one_graph_and_every_operand_is_quantized() -> None:
    plan = plan_of(pege_fx.prepare(attention(), "W4A4", (X,)))
    assert [note.rung for note in plan.captures] == ["specialised"]
    assert len(plan.operations) == 5
    assert not [edge for operation in plan.operations for edge in operation.edges if edge.spec is None]


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_the_function_is_kept_for_other_batches() -> None:
    all_float = QuantPolicy((Rule(weight=None, input=None),))
    model = attention().eval()
    gm = pege_fx.prepare(model, all_float, (X,)).eval()
    for x in (X, torch.randn(3, 16, 8)):
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_copies_pickles_and_conversions_compute_the_same() -> None:
    gm = pege_fx.prepare(attention(), "W4A4", (X,)).eval()
    expected = gm(X)
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), pege_fx.convert(gm)):
        assert torch.equal(other(X), expected)


@given(st.lists(st.text(string.ascii_lowercase, min_size=1), min_size=3, max_size=3, unique=True))
def test_patterns_of_einsum_are_those_of_torch(names: list[str]) -> None:
    i, j, k = names
    assert letters(f"{i} {j}, {j} {k} -> {i} {k}") == "ab,bc->ac"
    assert letters(f"... {i} {j}, {j} {k} -> ... {i} {k}") == "...ab,bc->...ac"
