"""QONNX: ``Quant`` nodes that say scale, zero point and bits; the file runs in ONNX Runtime and in the qonnx package."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import QuantPolicy, QuantSpec, Rule, testing
from pege_fx.numerics.functional import dequantize, quantize

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from pege_fx.export.qonnx import DOMAIN, VERSION, definition  # noqa: E402 (needs onnx)

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, groups=2), nn.GELU(),
        nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


class Two(nn.Module):
    """Two inputs, two results, a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        both = self.left(x) @ self.right(y).transpose(-1, -2)
        return {"product": both, "left": torch.relu(self.left(y))}


CASES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "convolutions": (network, (X,)),
    "products": (Two, (torch.randn(2, 4, 8), torch.randn(2, 4, 8))),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (torch.randn(2, 5, 8),)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3, 2, groups=1), nn.Conv1d(4, 2, 1)),
        (torch.randn(2, 3, 6),),
    ),
}


def deployed(model: nn.Module, policy: QuantPolicy | str, inputs: tuple[Tensor, ...], **options: Any) -> GraphModule:
    with pege_fx.kernels.eager_kernels():
        return pege_fx.convert(pege_fx.prepare(testing.as_trained(model, 0).eval(), policy, inputs), **options)


def exported(model: GraphModule, folder: Path, inputs: tuple[Tensor, ...] = (X,), **options: Any) -> Any:
    path = folder / "model.onnx"
    pege_fx.export_onnx(model, path, inputs, style="qonnx", **options)
    report = pege_fx.verify_export(model, path, [inputs])
    assert report.ok, report
    return onnx.load(path)


def quants(proto: Any) -> dict[str, tuple[dict[str, Any], list[Any]]]:
    """Settings and grid (scale, zero point, bits) of every Quant, by its name."""
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return {
        node.name: (
            {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute},
            [constants[name] for name in node.input[1:]],
        )
        for node in proto.graph.node
        if node.op_type == "Quant"
    }


@pytest.mark.parametrize("method", ["lsq", "pact", "minmax", "dorefa", "interval"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_methods_and_widths_say_the_same(method: str, bits: int, tmp_path: Path) -> None:
    policy = QuantPolicy.parse(f"W{bits}A{bits}", first=str(bits), last=str(bits), method=method)
    proto = exported(deployed(network(), policy, (X,)), tmp_path)
    assert {kind.op_type for kind in proto.graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    assert {float(grid[2]) for _, grid in quants(proto).values()} == {float(bits)}


def test_a_quant_says_what_the_policy_says(tmp_path: Path) -> None:
    rules = (
        Rule(weight=QuantSpec(bits=3), input=QuantSpec(bits=6, method="minmax")),
        Rule(match="4", weight=QuantSpec(bits=4, granularity="tensor"), input=QuantSpec(bits=5)),
        Rule(match="7", weight="2", input=QuantSpec(bits=4, narrow=True)),
    )
    model = deployed(network(), QuantPolicy(rules), (X,))
    proto = exported(model, tmp_path)
    assert {(part.domain, part.version) for part in proto.opset_import} == {("", 17), (DOMAIN, VERSION)}
    found = quants(proto)
    attributes, (scale, zero, bits) = found["_4_weight_dq"]
    assert attributes == {"signed": 1, "narrow": 0, "rounding_mode": b"ROUND"}
    assert (float(bits), float(zero)) == (4, 0)
    assert scale.shape == ()
    assert found["_0_weight_dq"][1][0].shape == (6, 1, 1, 1)
    assert found["_3_dq"][0]["signed"] == 0  # behind a ReLU
    assert found["_6_dq"][0] == {"signed": 1, "narrow": 1, "rounding_mode": b"ROUND"}
    assert float(found["input_1_dq"][1][1]) == round(float(found["input_1_dq"][1][1])) != 0
    weights = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in proto.graph.initializer}
    codes, scale = (model.get_buffer(f"7.weight_{part}") for part in ("codes", "scale"))
    assert torch.equal(weights["7.weight"], dequantize(codes, scale, bits=2))


@pytest.mark.parametrize("options", [{"integer_bias": True}, {"packed": True}])
def test_what_convert_can_do_is_exported(options: dict[str, bool], tmp_path: Path) -> None:
    model = deployed(network(), "W4A4", (X,), **options)
    widths = {float(grid[2]) for _, grid in quants(exported(model, tmp_path)).values()}
    assert (32 in widths) is ("integer_bias" in options)


@pytest.mark.parametrize("opset", [18, 21, 25])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    assert exported(deployed(network(), "W4A4", (X,)), tmp_path, opset=opset).opset_import[0].version == opset


@given(testing.tensors(shape=(2, 5)), st.integers(2, 8), st.booleans(), st.booleans(), st.sampled_from([0.0, -3.0, 7.0, 0.5]))
def test_the_definition_is_what_quantize_and_dequantize_compute(
    x: Tensor, bits: int, signed: bool, narrow: bool, zero: float
) -> None:
    names = ("x", "scale", "zero_point", "bits")
    kind = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(
        "Quant", names, ["y"], domain=DOMAIN, signed=int(signed), narrow=int(narrow and signed), rounding_mode="ROUND"
    )
    shapes = dict.fromkeys(names, ()) | {"x": (2, 5), "y": (2, 5)}
    values = [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph([node], "quant", values[:-1], values[-1:]),
        opset_imports=[onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        functions=[definition(17)],
        ir_version=8,
    )
    onnx.checker.check_model(proto, full_check=True)
    grid = torch.tensor(0.25), torch.tensor(zero), torch.tensor(float(bits))
    feed = dict(zip(names, (part.numpy() for part in (x, *grid)), strict=True))
    (y,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)
    codes = quantize(x + 0.25 * zero, grid[0], bits=bits, signed=signed, narrow=narrow)  # rounds the sum, as Quant does
    torch.testing.assert_close(torch.from_numpy(y), dequantize(codes, grid[0], grid[1], bits=bits))


# --- in the qonnx package ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports' own
        return pytest.importorskip("qonnx.core.modelwrapper"), pytest.importorskip("qonnx.core.onnx_exec")


def computed(package: Any, proto: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What the package's executor gives, node by node, its ``Quant`` by code of its own."""
    wrapper, executor = package
    model = wrapper.ModelWrapper(onnx.shape_inference.infer_shapes(proto))
    feed = {value.name: x.numpy() for value, x in zip(proto.graph.input, inputs, strict=True)}
    found = executor.execute_onnx(model, feed)
    return [torch.from_numpy(found[value.name]) for value in proto.graph.output]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("policy", ["W2A2", "W4A8"])
@pytest.mark.parametrize("name", CASES)
def test_its_executor_gives_the_model_s_answers(package: Any, name: str, policy: str, tmp_path: Path) -> None:
    make, inputs = CASES[name]
    model = deployed(make(), QuantPolicy.parse(policy, first=policy[1], last=policy[1]), inputs)
    proto = exported(model, tmp_path, inputs, dynamic_batch=False)  # it takes fixed sizes
    expected = model(*inputs)
    for found, wanted in zip(
        computed(package, proto, inputs), expected.values() if isinstance(expected, dict) else [expected], strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_its_tools_take_the_file(package: Any, tmp_path: Path) -> None:
    cleanup, to_qcdq = (pytest.importorskip(f"qonnx.{name}") for name in ("util.cleanup", "transformation.qonnx_to_qcdq"))
    model = deployed(network(), "W4A4", (X,))
    proto = exported(model, tmp_path, dynamic_batch=False)
    clean = cleanup.cleanup_model(package[0].ModelWrapper(proto))
    torch.testing.assert_close(computed(package, clean.model, (X,))[0], model(X), rtol=1e-5, atol=1e-6)
    turned = clean.transform(to_qcdq.QuantToQCDQ()).model
    assert "QuantizeLinear" in {node.op_type for node in turned.graph.node}
    session = onnxruntime.InferenceSession(turned.SerializeToString())
    (found,) = session.run(None, {turned.graph.input[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(X), rtol=1e-5, atol=1e-6)
