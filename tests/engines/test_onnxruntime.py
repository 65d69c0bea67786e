"""ONNX Runtime's engine: layers reach its integer kernels, and compute what the model computes."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import ExportError, QuantPolicy, QuantSpec, engines
from pege_fx.policy.rules import Rule

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True, scope="module")
def _eager() -> Iterator[None]:
    """Nothing is trained here: compiled kernels would cost more than they save."""
    with pege_fx.kernels.eager_kernels():
        yield


X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """An inverted residual with bounded activations, signed sums, a concatenation and a head."""

    def __init__(self, bound: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.depthwise, self.project = (
            nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)
        )  # fmt: skip
        self.last, self.fc, self.bound = nn.Conv2d(16, 8, 1), nn.Linear(8 * 64, 5), bound

    def forward(self, x: Tensor) -> Tensor:
        y = self._bounded(self.depthwise(self._bounded(self.expand(x))))
        y = x + self.project(y)
        out: Tensor = self.fc(self._bounded(self.last(torch.cat([x, y], 1))).flatten(1))
        return out

    def _bounded(self, x: Tensor) -> Tensor:
        return F.relu6(x) if self.bound is None else F.hardtanh(x, -self.bound, self.bound / 2)


def deployed(model: nn.Module, policy: Any = None, **options: Any) -> GraphModule:
    policy = policy or QuantPolicy.parse("W8A8", engine="onnxruntime", **options)
    return pege_fx.convert(pege_fx.prepare(model.eval(), policy, (X,)), integer_bias=True)


@pytest.mark.parametrize("method", ["lsq", "minmax"])
@pytest.mark.parametrize("bound", [None, 0.7])
def test_layers_reach_the_integer_kernels(bound: float | None, method: str, tmp_path: Path) -> None:
    model = deployed(Block(bound), method=method)
    engines.export(model, tmp_path / "model.onnx", (X[:1],))
    profile = engines.engine_of("onnxruntime").profile(tmp_path / "model.onnx", X)
    assert profile.kernels["QLinearConv"] == 4, profile
    assert profile.kernels.get("QLinearAdd") == 1, profile
    assert profile.seconds > 0
    report = pege_fx.verify(model, tmp_path / "model.onnx", [X, X[:1]])
    assert report.ok, report
    plain = deployed(Block(bound), "W8A8")
    pege_fx.export_onnx(plain, tmp_path / "plain.onnx", (X[:1],))
    assert engines.engine_of("onnxruntime").profile(tmp_path / "plain.onnx", X).share < profile.share


def test_all_activations_are_uint8(tmp_path: Path) -> None:
    engines.export(deployed(Block()), tmp_path / "model.onnx", (X[:1],))
    proto = onnx.load(tmp_path / "model.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    starts = {kinds[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    assert starts == {onnx.TensorProto.UINT8}


class Bounded(nn.Module):
    """Bounds between two layers."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.low, self.high = nn.Linear(8, 8), nn.Linear(8, 3), low, high

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).clamp(self.low, self.high))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["lsq", "minmax"])
@pytest.mark.parametrize(
    ("low", "high", "bits"), [(0.0, 0.0, 2), (0.0, 2.0, 4), (-3.0, -1.0, 3), (0.5, 2.0, 2), (-1.0, 0.3, 8)]
)
def test_bounds_of_codes_are_codes_of_bounds(low: float, high: float, bits: int, method: str, tmp_path: Path) -> None:
    """Rounding keeps the order: what is clipped and quantized is what is quantized and clipped."""
    policy = QuantPolicy((Rule(weight="8", input=QuantSpec(bits=bits, method=method)),))
    engines.export(model := deployed(Bounded(low, high), policy), tmp_path / "model.onnx", (X,))
    report = pege_fx.verify(model, tmp_path / "model.onnx", [X, 3 * X])
    assert report.ok, report


def test_why_a_layer_stays_float() -> None:
    policy = QuantPolicy.parse("W8A8", engine="onnxruntime")
    rules = (*policy.rules, Rule(match="project", weight="4"), Rule(match="last", input=None))
    told = pege_fx.explain(Block(), QuantPolicy(rules), (X,), engine="onnxruntime")
    assert told["expand"].engine == "onnxruntime: in integers"
    assert told["project"].engine == "onnxruntime: in float, its weight has 4 bits; ONNX Runtime multiplies codes of 8 bits"
    assert told["last"].engine.startswith("onnxruntime: in float, its input is float: float by the policy")
    transposed = pege_fx.explain(nn.ConvTranspose2d(8, 4, 3), policy, (X,), engine="onnxruntime")
    assert "no integer kernel for conv_transpose2d" in transposed[""].engine


def test_the_policy_is_an_ordinary_one() -> None:
    policy = QuantPolicy.parse("W8A8", engine="onnxruntime", method="minmax")
    assert policy.rules[0].input == QuantSpec(bits=8, method="minmax")
    assert [rule.function for rule in policy.rules if rule.optional] == ["add", "sub", "mul", "cat", "stack"]
    assert QuantPolicy.from_json(policy.to_json()) == policy
    assert QuantPolicy.parse("W8", engine="onnxruntime") == QuantPolicy.parse("W8")


def test_a_file_that_it_can_not_run(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match="ONNX Runtime can not run"):
        engines.engine_of("onnxruntime").profile(tmp_path / "text.onnx", X)


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    root = Path(__file__).parents[2]
    made = runpy.run_path(str(root / "benchmarks" / "engines.py"))
    results = json.loads((root / "benchmarks" / "results" / "engines.json").read_text())
    assert made["TABLE"].search((root / "docs" / "deploy.md").read_text()).group() == made["table"](results)
