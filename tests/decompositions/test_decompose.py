"""What is written out computes what the original computes, with every weight as an edge."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import pege_fx
from pege_fx import Constant, PEGEScheduler
from pege_fx.decompositions.recurrent import EXPLICIT_CELLS
from pege_fx.training.scheduler import plan_of

CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def at_p_0(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Prepared, without a single replaced element: the float function."""
    gm = pege_fx.prepare(model, "W4A4", args, kwargs)
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    return gm


def check(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    gm = at_p_0(model.train(), args, kwargs)
    for made in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert_equal(made(*args, **kwargs), model(*args, **kwargs), rtol=1e-4, atol=1e-5)
    one, zero = Constant(1.0), Constant(0.0)
    PEGEScheduler(gm, 1, one, zero, zero)
    torch.stack([leaf.sum() for leaf in leaves(gm(*args, **kwargs))]).sum().backward()
    used = {name for name, p in gm.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.stack([leaf.sum() for leaf in leaves(model(*args, **kwargs))]).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= used
    with torch.no_grad():
        deployed = pege_fx.convert(gm.eval())
        for made in (deployed, pickle.loads(pickle.dumps(deployed))):
            assert_equal(made(*args, **kwargs), gm(*args, **kwargs), rtol=0, atol=0)


def leaves(value: Any) -> list[Tensor]:
    return [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in tree_leaves(value) if leaf is not None]


def assert_equal(a: Any, b: Any, rtol: float, atol: float) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)


def weight_edges(model: nn.Module, *args: Any) -> list[str]:
    """The weights that are quantized."""
    plan = plan_of(pege_fx.prepare(model, "W4A4", args))
    return [edge.source for operation in plan.operations for edge in operation.edges if edge.operand.startswith("weight")]


# --- recurrent layers ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_first": True, "num_layers": 2, "bidirectional": True},
        {"bias": False},
        {"nonlinearity": "relu"},
        {"proj_size": 3},
    ],
    ids=str,
)
def test_recurrent_layers(cls: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    if ("nonlinearity" in settings and cls is not nn.RNN) or ("proj_size" in settings and cls is not nn.LSTM):
        pytest.skip("only some have it")
    layer: nn.RNNBase = cls(4, 5, **settings)
    x = values(3, 2, 4)
    check(layer, x)
    assert weight_edges(layer, x) == [name for name, _ in layer.named_parameters() if name.startswith("weight")]


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_recurrent_layers_with_a_first_state_without_a_batch_and_packed(cls: type[nn.RNNBase]) -> None:
    layer: Any = cls(4, 5)
    first = values(1, 2, 5)
    check(layer, values(3, 2, 4), (first, first + 1) if cls is nn.LSTM else first)
    check(layer, values(3, 4))
    alone = values(1, 5)
    check(layer, values(3, 4), (alone, alone) if cls is nn.LSTM else alone)
    packed = pack_padded_sequence(values(3, 2, 4), torch.tensor([2, 3]), enforce_sorted=False)
    gm = pege_fx.prepare(layer, "W8A8")
    for wanted, found in zip(leaves(layer(packed)), leaves(gm(packed)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
    state = (first, first) if cls is nn.LSTM else first
    gm = pege_fx.prepare(layer, "W8A8", (packed, state))
    for wanted, found in zip(leaves(layer(packed, state)), leaves(gm(packed, state)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


def test_dropout_between_recurrent_layers_follows_the_mode() -> None:
    model = nn.LSTM(4, 5, num_layers=2, dropout=0.5)
    gm, x = at_p_0(model, (values(3, 2, 4),), {}), values(3, 2, 4)
    torch.manual_seed(0)
    wanted = model(x)[0]
    torch.manual_seed(0)
    assert torch.equal(gm(x)[0], wanted)
    gm.eval()
    assert torch.equal(gm(x)[0], gm(x)[0])
    assert torch.equal(pege_fx.convert(at_p_1(gm))(x)[0], gm(x)[0])


def at_p_1(gm: Any) -> Any:
    one, zero = Constant(1.0), Constant(0.0)
    PEGEScheduler(gm, 1, one, zero, zero)
    return gm


class Unrolled(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Any:
        state = None
        for step in range(3):
            state = self.cell(x[step], state)
        return state


@pytest.mark.parametrize("cls", EXPLICIT_CELLS)
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"nonlinearity": "relu"}], ids=str)
def test_recurrent_cells(cls: Any, settings: dict[str, Any]) -> None:
    if "nonlinearity" in settings and cls is not nn.RNNCell:
        pytest.skip("only one has it")
    model = Unrolled(cls(4, 5, **settings))
    check(model, values(3, 2, 4))
    assert set(weight_edges(model, values(3, 2, 4))) == {"cell.weight_ih", "cell.weight_hh"}


def test_a_weight_that_is_read_at_several_steps_has_one_format() -> None:
    gm = pege_fx.prepare(Unrolled(nn.GRUCell(4, 5)), "W4A4", (values(3, 2, 4),))
    assert sorted(name for name in pege_fx.fake_quants(gm) if "weight" in name) == ["cell.weight_hh_fq", "cell.weight_ih_fq"]


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoders(norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    x = values(2, 5, 8)
    check(model, x)
    check(model, x, CAUSAL)
    check(model, x, mask=CAUSAL, is_causal=True)
    check(model, x, src_key_padding_mask=PADDING)
    assert len(weight_edges(model, x)) == 8


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [True, False])
def test_whole_transformers(norm_first: bool) -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, 0.0, norm_first=norm_first, batch_first=True)
    check(model, values(2, 5, 8), values(2, 5, 8), tgt_mask=CAUSAL, src_key_padding_mask=PADDING)
    assert len(weight_edges(model, values(2, 5, 8), values(2, 5, 8))) == 4 + 8  # cross attention: three parts of one weight


def test_the_fast_path_is_not_taken_behind_the_graphs_back() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    gm = pege_fx.prepare(layer, "W2A2", (values(2, 5, 8),))
    with torch.no_grad():
        assert not torch.allclose(gm(values(2, 5, 8)), layer(values(2, 5, 8)), atol=1e-3)
        assert torch.equal(pege_fx.convert(gm)(values(2, 5, 8)), gm(values(2, 5, 8)))


def test_subclasses_keep_their_own_forward() -> None:
    class Scaled(nn.GRUCell):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
            return 2 * super().forward(input, hx)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pege_fx.PegeWarning)
        model = nn.Sequential(nn.Linear(4, 4), Scaled(4, 5))
        gm = at_p_0(model, (values(2, 4),), {})
    assert torch.allclose(gm(values(2, 4)), model(values(2, 4)), atol=1e-6)


# --- optional arguments ----------------------------------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, *rest: Tensor | None, mask: Tensor | None = None, scale: float = 2.0, **more: Any) -> Tensor:
        y: Tensor = self.fc(x) * scale
        if mask is not None:
            y = y * mask
        for other in rest:
            if other is not None:
                y = y + other
        for value in more.values():
            y = y - value
        return y


class Last(nn.Module):
    """Asks what kind of thing it got, in a way that no graph hears of."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, keep: int | Tensor = 0, kind: str = "plain") -> Tensor:
        rows = slice(-keep, None) if isinstance(keep, int) else keep
        y: Tensor = self.fc(x[rows])
        return y if kind == "plain" else -y


X = values(2, 4)


@pytest.mark.parametrize("args", [(X,), (X, 1), (X, torch.tensor([0])), (X, 1, "other")])
def test_numbers_and_texts_are_fixed_and_another_is_refused(args: Any) -> None:
    check(Last(), *args)
    gm = pege_fx.prepare(Last(), "W4A4", args)
    with pytest.raises(pege_fx.InputError, match=r"(keep|kind) was .* when the model was traced"):
        gm(X, 2, "third")


def test_what_is_not_given_stays_none_and_what_is_given_counts() -> None:
    check(Optional(), X)
    check(Optional(), X, mask=X)
    check(Optional(), X, X, None, X, scale=3.0, a=X, b=X)
    gm = at_p_0(model := Optional(), (X,), {})
    assert torch.allclose(gm(X, scale=5.0), model(X, scale=5.0), atol=1e-6)  # a number stays an argument


def test_what_was_none_or_missing_and_is_given_later_is_refused_with_the_fix() -> None:
    gm = pege_fx.prepare(Optional(), "W4A4", (X,))
    for made in (gm, pickle.loads(pickle.dumps(gm))):
        made(X)
        with pytest.raises(pege_fx.InputError, match=r"mask was None when .*, and is a Tensor now.\n.*give prepare"):
            made(X, mask=X)
        with pytest.raises(pege_fx.InputError, match=r"rest had \[\] when .* now it has \[0\]"):
            made(X, X)
        with pytest.raises(pege_fx.InputError, match=r"more had \[\] when .* now it has \['a'\]"):
            made(X, a=X)
