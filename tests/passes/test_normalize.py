"""Normal form: modules with weights become functions, and nothing else changes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrizations import weight_norm

import pege_fx
from pege_fx.passes import normalize, run
from pege_fx.passes.capture.tiers import capture
from pege_fx.testing import Network, assert_same_function, networks


def normalized(model: nn.Module) -> GraphModule:
    gm = capture(model).root
    run(gm, [normalize])
    return gm


@given(networks())
def test_the_function_is_kept_in_both_modes(case: tuple[Network, tuple[Tensor, ...]]) -> None:
    network, inputs = case
    for mode in (True, False):
        network.train(mode)
        # Attention is written out, in products of other sizes than torch's own, which some processors round another way.
        exactly = {} if network.contains("attention") else {"tolerance": 0}
        assert_same_function(network, normalized(network), inputs, **exactly)


LAYERS: list[tuple[nn.Module, Tensor]] = [
    (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), torch.randn(2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), padding_mode="reflect"), torch.randn(2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", groups=2), torch.randn(2, 4, 9, 8)),
    (nn.Conv3d(4, 6, 3, padding=1, padding_mode="replicate"), torch.randn(2, 4, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), torch.randn(2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), torch.randn(2, 4, 5, 6)),
    (nn.ConvTranspose3d(4, 6, 2), torch.randn(2, 4, 3, 3, 3)),
    (nn.Linear(4, 6, bias=False), torch.randn(2, 7, 4)),
    (nn.Embedding(7, 4, padding_idx=0, scale_grad_by_freq=True), torch.randint(7, (3, 5))),
    (nn.EmbeddingBag(7, 4, mode="max"), torch.randint(7, (3, 5))),
]


@pytest.mark.parametrize(("layer", "x"), LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS])
def test_every_layer_becomes_its_function_with_the_weight_as_an_edge(layer: nn.Module, x: Tensor) -> None:
    gm = normalized(nn.Sequential(layer))
    assert torch.equal(gm(x), layer(x))
    (read,) = gm.graph.find_nodes(op="get_attr", target="0.weight")
    assert [user.op for user in read.users] == ["call_function"]
    assert set(gm.state_dict()) == {f"0.{name}" for name in layer.state_dict()}


# Settings, and what of them is left in the graph: what the function takes for granted is not.
X = torch.randn(2, 4, 12, 13)
SETTINGS: list[tuple[nn.Module, Tensor, dict[str, object]]] = [
    (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 8), {}),
    (nn.Conv2d(4, 6, 3, stride=2), torch.randn(2, 4, 9, 8), {"stride": (2, 2)}),
    (nn.Conv2d(4, 6, 3, stride=(1, 2)), torch.randn(2, 4, 9, 8), {"stride": (1, 2)}),
    (nn.Conv2d(4, 6, 3, padding=1, dilation=2), torch.randn(2, 4, 9, 8), {"padding": (1, 1), "dilation": (2, 2)}),
    (nn.Conv2d(4, 6, 3, padding="same"), torch.randn(2, 4, 9, 8), {"padding": "same"}),
    (nn.Conv2d(4, 6, 3, padding="valid", groups=2), torch.randn(2, 4, 9, 8), {"padding": "valid", "groups": 2}),
    (nn.Conv2d(4, 6, 3, padding="valid", padding_mode="reflect"), torch.randn(2, 4, 9, 8), {}),
    (nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="replicate"), torch.randn(2, 4, 9, 8), {}),
    (nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular", dilation=(1, 3)), X, {"dilation": (1, 3)}),
    (nn.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 5, 5), {}),
    (nn.ConvTranspose2d(4, 6, 3, 3, 1, (0, 2)), X, {"stride": (3, 3), "padding": (1, 1), "output_padding": (0, 2)}),
    (nn.Embedding(7, 4), torch.randint(7, (3, 5)), {}),
    (nn.Embedding(7, 4, padding_idx=2), torch.randint(7, (3, 5)), {"third": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "x", "kwargs"), SETTINGS)
def test_settings_other_than_the_defaults_are_in_the_graph(layer: nn.Module, x: Tensor, kwargs: dict[str, object]) -> None:
    gm = normalized(nn.Sequential(layer))
    assert torch.equal(gm(x), layer(x))
    call = next(node for node in gm.graph.nodes if node.name == "_0")
    third = [{"third": arg} for arg in call.args[2:3] if isinstance(arg, int)]  # of a convolution it is the bias
    fourth = [{"stride": arg} for arg in call.args[3:]]
    assert {name: value for part in (*third, *fourth, call.kwargs) for name, value in part.items()} == kwargs
    (gm(x).sum() * 2).backward()
    gradient = layer.weight.grad
    layer.weight.grad = None
    (layer(x).sum() * 2).backward()
    assert gradient is None or torch.equal(gradient, layer.weight.grad)


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_a_layer_with_sparse_gradients_stays_a_module_and_says_why(cls: type[nn.Module]) -> None:
    gm = normalized(nn.Sequential(cls(7, 4, sparse=True)))
    (node,) = gm.graph.find_nodes(op="call_module")
    assert node.meta["not_normalized"] == "0 has sparse gradients (sparse=True), which a quantized weight has not"


class Calls(nn.Module):
    """Calls its child as it is told to."""

    def __init__(self, child: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.child, self.call = child, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.child, x)


WORDS, PAIRS = torch.randint(7, (8,)), torch.randn(3, 4)
CALLS: list[tuple[nn.Module, Tensor, Callable[..., Tensor]]] = [
    (nn.EmbeddingBag(7, 4, mode="sum"), WORDS, lambda m, x: m(x, torch.tensor([0, 3]), torch.arange(8.0))),
    (nn.EmbeddingBag(7, 4, include_last_offset=True), WORDS, lambda m, x: m(input=x, offsets=torch.tensor([0, 3, 8]))),
    (nn.EmbeddingBag(7, 4, padding_idx=1), WORDS.view(2, 4), lambda m, x: m(x)),
    (nn.Bilinear(4, 4, 5), PAIRS, lambda m, x: m(x, x + 1)),
    (nn.Bilinear(4, 4, 5, bias=False), PAIRS, lambda m, x: m(input2=x, input1=x + 1)),
]


@pytest.mark.parametrize(("layer", "x", "call"), CALLS)
def test_layers_of_several_inputs_are_called_as_they_were(layer: nn.Module, x: Tensor, call: Callable[..., Tensor]) -> None:
    model = Calls(layer, call)
    gm = normalized(model)
    assert torch.equal(gm(x), model(x))
    assert not gm.graph.find_nodes(op="call_module", target="child")


REFUSED: list[tuple[nn.Module, Tensor, Callable[..., Tensor], str]] = [
    (nn.Linear(4, 5), PAIRS, lambda m, x: m(input=x), "child is called with more than its input"),
    (nn.ConvTranspose1d(3, 2, 3, 2), PAIRS, lambda m, x: m(x, [10]), "child is called with more than its input"),
    (nn.EmbeddingBag(7, 4, max_norm=1.0), WORDS.view(2, 4), lambda m, x: m(x), "changes its weight in place (max_norm)"),
    (nn.Embedding(7, 4, max_norm=1.0), WORDS, lambda m, x: m(x), "changes its weight in place (max_norm)"),
]


@pytest.mark.parametrize(("layer", "x", "call", "reason"), REFUSED)
def test_what_a_function_can_not_say_stays_a_module(
    layer: nn.Module, x: Tensor, call: Callable[..., Tensor], reason: str
) -> None:
    model = Calls(layer, call)
    gm = normalized(model)
    (node,) = gm.graph.find_nodes(op="call_module", target="child")
    assert reason in node.meta["not_normalized"]
    assert torch.equal(gm(x), model(x))


def test_a_forward_or_parameters_of_its_own_stay_a_module() -> None:
    own, convolving, masked = nn.Linear(4, 4), nn.Conv1d(3, 3, 1), nn.Linear(4, 4)
    own.forward = lambda x: x  # type: ignore[method-assign]
    convolving._conv_forward = lambda x, *_: x  # type: ignore[method-assign]
    masked.register_buffer("mask", torch.ones(4))
    gm = normalized(nn.Sequential(own, convolving, masked))
    reasons = [node.meta.get("not_normalized", "") for node in gm.graph.find_nodes(op="call_module")]
    assert [reason.split(" ", 1)[1] for reason in reasons if reason] == [
        "has hooks or a forward of its own",
        "has hooks or a forward of its own",
        "computes its weight from other parameters",
    ]


def test_operations_that_are_a_whole_module_have_its_path() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.LSTM(5, 3))
    paths = {op.path for op in pege_fx.explain(model, "W4A4", (PAIRS,)).operations}
    assert paths == {"0", "1"}


def test_functions_have_their_first_arguments_by_position() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(weight=self.w, input=x) + F.linear(x, bias=None, weight=self.w)

    model, x = Plain(), torch.randn(2, 4)
    gm = normalized(model)
    assert torch.equal(gm(x), model(x))
    calls = gm.graph.find_nodes(op="call_function", target=F.linear)
    (read,) = gm.graph.find_nodes(op="get_attr")  # once, though two functions read it
    assert [[str(arg) for arg in call.args] for call in calls] == [["x", str(read)], ["x", str(read), "None"]]
    assert all(not call.kwargs for call in calls)


def test_what_stays_a_module_says_why() -> None:
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    explanation = pege_fx.explain(nn.Sequential(nn.Linear(4, 4), hooked, nn.Embedding(4, 4, max_norm=1.0)), "W4A4")
    assert "has hooks" in explanation["1"].reason
    assert "in place" in explanation["2"].reason


def test_a_tied_weight_is_read_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    gm = normalized(nn.Sequential(first, second))
    (read,) = [n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target).endswith("weight")]
    assert len(read.users) == 2


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.mul_(2.0)  # nobody uses the result, but everybody after sees it
        F.relu_(y)
        y += 1
        same = y
        same += 1  # another name of y
        z = torch.zeros_like(y)
        z[:, 0] = y[:, 0]
        out: Tensor = self.other(y) + z
        return out


def test_in_place_operations_keep_their_effect_and_their_place() -> None:
    model, x = InPlace(), torch.randn(2, 3, 4, 4)
    assert torch.equal(normalized(model)(x), model(x))
    gm = pege_fx.prepare(model, "W4A4", (x,))
    zero = pege_fx.Constant(0.0)
    pege_fx.PEGEScheduler(gm, 1, zero, zero, zero)
    assert torch.equal(gm(x), model(x))
    (fake_quant,) = [n for n in gm.graph.nodes if n.name.endswith("_fq") and "weight" not in n.name and "x" not in n.name]
    assert "add" in str(fake_quant.all_input_nodes[0])  # the convolution's input is quantized after the last change
