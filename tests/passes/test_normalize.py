"""Normal form: modules with weights become functions, and nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx.passes import normalize, run
from pege_fx.passes.capture import capture
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
        assert_same_function(network, normalized(network), inputs, tolerance=0)


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
