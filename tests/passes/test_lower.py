"""Lowering: integers with scales, the values of evaluation."""

import math

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import ConvertError, ForwardMethod, ModelError, PegeWarning, QuantPolicy, Statistics


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )


X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["lsq", "pact", "minmax", "dorefa", "interval"])
def test_the_deployed_model_computes_what_evaluation_does(method: str, bits: int) -> None:
    gm = pege_fx.prepare(model(), QuantPolicy.parse(f"W{bits}A{bits}", method=method), (X,))
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-2)
    for _ in range(2):
        gm(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gm.eval()
    deployed = pege_fx.convert(gm)
    with torch.no_grad():
        assert torch.equal(deployed(X), gm(X))
    assert torch.equal(gm(X).detach(), deployed(X))  # with gradient too


def test_weights_are_integers_and_nothing_of_training_is_left() -> None:
    gm = pege_fx.prepare(model(), QuantPolicy.parse("W3A4", first="3", last="3"), (X,))
    deployed = pege_fx.convert(gm)
    kinds = {type(module).__module__ for module in deployed.modules()}
    assert not any(kind.startswith("pege_fx") for kind in kinds)
    assert [name for name, _ in deployed.named_parameters()] == ["3.bias", "5.bias"]  # what no BatchNorm took over
    codes = {name: value for name, value in deployed.named_buffers() if name.endswith("codes")}
    assert set(codes) == {"0.weight_codes", "3.weight_codes", "5.weight_codes"}
    for value in codes.values():
        assert value.dtype is torch.int8
        assert -4 <= int(value.min()) <= int(value.max()) <= 3
    assert not deployed.training


class Standardized(nn.Conv1d):
    """A convolution whose weight is computed from its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.weight.mean((1, 2), keepdim=True), self.weight.std((1, 2), keepdim=True)
        return nn.functional.conv1d(x, (self.weight - mean) / deviation, self.bias)


@pytest.mark.parametrize("method", ["lsq", "minmax", "dorefa", "interval"])
def test_weights_that_are_computed_are_integers_too(method: str) -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3))
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))
    x = torch.randn(2, 2, 10)
    network = nn.Sequential(normed, nn.BatchNorm1d(4), nn.ReLU(), Standardized(4, 4, 3), nn.ReLU(), spectral)
    gm = pege_fx.prepare(network, QuantPolicy.parse("W4A4", method=method), (x,))
    gm(x).sum().backward()
    deployed = pege_fx.convert(gm.eval())
    with torch.no_grad():
        assert torch.equal(deployed(x), gm(x))
    codes = {name: value.dtype for name, value in deployed.named_buffers() if name.endswith("codes")}
    paths = ("0.parametrizations.weight", "3.truediv", "5.parametrizations.weight")
    kind = torch.uint8 if method == "dorefa" else torch.int8  # DoReFa's weights have unsigned codes
    assert codes == {f"{path}_codes": kind for path in paths}
    assert not deployed.graph.find_nodes(op="call_module")
    assert all(parameter.ndim == 1 for parameter in deployed.parameters())


def test_a_weight_that_never_ran_is_codes_too() -> None:
    """Without example inputs and before any forward; data would set its grid, and its own values are all of its data."""
    gm = pege_fx.prepare(model().eval(), QuantPolicy((pege_fx.Rule(weight="4"),)))
    deployed = pege_fx.convert(gm)
    assert {name for name, _ in deployed.named_buffers() if name.endswith("codes")} == {f"{i}.weight_codes" for i in (0, 3, 5)}
    assert torch.equal(deployed(X), gm.eval()(X))


def test_codes_of_eight_bits_are_packed_already() -> None:
    gm = pege_fx.prepare(model(), QuantPolicy.parse("W7A8", first="8", last="8"), (X,))
    deployed = pege_fx.convert(gm, packed=True)
    assert [name for name, _ in deployed.named_buffers() if name.endswith("packed")] == ["3.weight_codes_packed"]


def test_biases_of_a_layer_with_one_scale_are_integers_too() -> None:
    spec = pege_fx.QuantSpec(bits=4, granularity="tensor")
    gm = pege_fx.prepare(nn.Linear(4, 3), QuantPolicy((pege_fx.Rule(weight=spec, input="4"),)), (torch.randn(5, 4),))
    deployed = pege_fx.convert(gm, integer_bias=True)
    assert deployed.get_buffer("bias_codes").dtype is torch.int32
    assert deployed.get_buffer("bias_scale").tolist() == 3 * [deployed.get_buffer("bias_scale")[0]]


@pytest.mark.parametrize("packed", [False, True])
def test_biases_are_integers_in_the_units_of_the_accumulators(packed: bool) -> None:
    """Exactly round(b / s) * s as int32, with s the scale of the input times those of the weight's channels."""
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(5, 4)
    gm = pege_fx.prepare(network, QuantPolicy.parse("W3A4", last="3"), (x,))
    deployed = pege_fx.convert(gm, integer_bias=True, packed=packed)
    held = dict(deployed.named_buffers())
    scale = held["2.weight_scale"].flatten() * held["_1_fq_scale"]
    assert scale.shape == (3,)
    assert torch.allclose(held["2.bias_scale"], scale, rtol=1e-6, atol=0)
    assert held["2.bias_codes"].dtype is torch.int32
    assert torch.equal(
        held["2.bias_codes"], (network.get_parameter("2.bias").double() / held["2.bias_scale"].double()).round().int()
    )
    decoded = deployed.graph.find_nodes(op="call_function", target=pege_fx.functional.dequantize)
    assert {node.name: node.kwargs["bits"] for node in decoded if "bias" in node.name} == {"_0_bias_dq": 32, "_2_bias_dq": 32}
    assert ("2.weight_codes_packed" in held) is packed


def test_what_a_grid_does_not_have_is_not_in_the_graph() -> None:
    deployed = pege_fx.convert(pege_fx.prepare(model(), "W4A4", (X,)))
    codes = deployed.graph.find_nodes(op="call_function", target=pege_fx.functional.quantize)
    assert [[str(source) for source in node.args] for node in codes] == [
        [str(node.args[0]), f"{node.args[0]}_fq_scale"] for node in codes
    ]


def test_the_size_report_counts_codes_by_their_bits() -> None:
    gm = pege_fx.prepare(nn.Linear(5, 3), QuantPolicy.parse("W3A8", first="3", last="3"), (torch.randn(2, 5),))
    size = pege_fx.size_report(pege_fx.convert(gm))
    assert size.float_bytes == 4 * (15 + 3)
    scales = 4 * 3 + 4  # three channels, one activation
    assert size.quantized_bytes == math.ceil(15 * 3 / 8) + 4 * 3 + scales
    assert "times smaller" in str(size)


def test_half_models_deploy_too() -> None:
    gm = pege_fx.prepare(model().to(torch.bfloat16), "W4A4", (X.bfloat16(),)).eval()
    with torch.no_grad():
        assert torch.equal(pege_fx.convert(gm)(X.bfloat16()), gm(X.bfloat16()))


def test_the_prepared_model_is_left_alone() -> None:
    gm = pege_fx.prepare(model(), "W4A4", (X,)).train()
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    pege_fx.convert(gm)
    assert gm.training
    assert all(torch.equal(value, gm.state_dict()[name]) for name, value in before.items())
    gm(X).sum().backward()


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"call pege_fx\.prepare"):
        pege_fx.convert(torch.fx.symbolic_trace(model()))


def test_unfinished_replacement_warns() -> None:
    gm = pege_fx.prepare(model(), "W4A4", (X,))
    pege_fx.PEGEScheduler(gm, 10, pege_fx.Constant(0.5))
    with pytest.warns(PegeWarning, match=r"p = 0\.500"):
        pege_fx.convert(gm)


def test_a_bias_of_another_size_than_the_scales_stays_float() -> None:
    class OneForAll(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    x = torch.randn(5, 4)
    gm = pege_fx.prepare(OneForAll(), "W8A8", (x,)).eval()
    deployed = pege_fx.convert(gm, integer_bias=True)
    assert torch.equal(deployed(x), gm(x))
    assert torch.equal(deployed.get_parameter("bias"), torch.ones(1))


class Undecided(nn.Module):
    """Stays Python as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return x if float(x.sum()) > 0 else -x


def test_a_root_that_stays_python_keeps_nothing_of_training() -> None:
    x = torch.randn(2, 4)
    with pytest.warns(PegeWarning, match="stays Python"):
        gm = pege_fx.prepare(Undecided().eval(), "W4A4", (x,))
    deployed = pege_fx.convert(gm)
    assert set(deployed.state_dict()) == {"fc.bias", "fc.weight_codes", "fc.weight_scale", "fc.input_1_fq_scale"}
    with torch.no_grad():
        assert torch.equal(deployed(x), gm(x))


class Positions(nn.Module):
    """A table that is not stored, made in ``__init__``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 6), persistent=False)


class Listed(nn.Module):
    """Stays Python, and calls graphs of a list and what only holds a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
        self.positions = Positions()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if float(x.detach().sum()) > -1e9:
                x = block(x) + self.positions.table
        return x


def test_graphs_in_a_list_of_a_module_that_stays_python_keep_nothing_of_training() -> None:
    with pytest.warns(PegeWarning, match="stays Python"):
        gm = pege_fx.prepare(Listed().eval(), "W4A4", (X,))
    deployed = pege_fx.convert(gm)
    assert torch.equal(deployed(X), gm(X))
    assert not any(part in name for name in deployed.state_dict() for part in ("running", "calibrated", "method"))


class Bent(ForwardMethod, name="bent-for-this-test"):
    """A transform without a word on how it is deployed."""

    def initialize(self, statistics: Statistics) -> None:
        pass

    def transform(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def qparams(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.tensor(0.25), None


def test_a_method_that_does_not_say_how_it_is_deployed_is_named() -> None:
    gm = pege_fx.prepare(nn.Linear(4, 4), QuantPolicy((pege_fx.Rule(input=pege_fx.QuantSpec(bits=4, method=Bent)),)))
    gm(torch.randn(2, 4))
    with pytest.raises(ConvertError, match=r"Bent transforms its input.*override encoding"):
        pege_fx.convert(gm)


class Encoded(nn.Module):
    """A convolution that two modules hold, and the model itself; a module that holds nothing but what is not stored."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.encoding = Positions(), nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
        self.blocks = nn.ModuleList(nn.Sequential(self.encoding, nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + self.positions.table
        return x


def test_modules_at_several_paths_and_tensors_that_are_not_stored() -> None:
    """Found by the coverage table (CoaT, EVA-02): what was deleted at one path was looked for at another."""
    gm = pege_fx.prepare(Encoded().eval(), "W4A4", (X,))
    deployed = pege_fx.convert(gm)
    assert torch.equal(deployed(X), gm(X))
    assert not any("fq" in name for name, _ in deployed.named_modules(remove_duplicate=False))
