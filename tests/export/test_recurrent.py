"""LSTM, GRU and RNN: one ONNX operator for each layer, its weights packed, its gates in ONNX's order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import ExportError, QuantPolicy

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


class Recurrent(nn.Module):
    """A recurrent layer, its output and its last state."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = KINDS[kind](4, 3, **options)

    def forward(self, x: Tensor, state: Any = None) -> dict[str, Any]:
        y, last = self.rnn(x, state)
        return {"y": y, "last": last}


def deployed(model: nn.Module, inputs: tuple[Any, ...], bits: str = "4") -> GraphModule:
    with pege_fx.kernels.eager_kernels():
        return pege_fx.convert(pege_fx.prepare(model.eval(), QuantPolicy.parse(f"W{bits}A8", first=bits, last=bits), inputs))


OPTIONS = st.fixed_dictionaries(
    {"num_layers": st.integers(1, 3), "bidirectional": st.booleans(), "batch_first": st.booleans(), "bias": st.booleans()}
)


@given(st.sampled_from([*KINDS]), OPTIONS, st.sampled_from([("qdq", None), ("qdq", 25), ("qcdq", 17), ("qonnx", None)]))
@settings(max_examples=settings.default.max_examples // 2, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_recurrent_layers_are_exported(tmp_path: Path, kind: str, options: dict[str, Any], form: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    model = deployed(Recurrent(kind, **options), (x,), "2")
    style, opset = form
    pege_fx.export_onnx(model, tmp_path / "model.onnx", (x,), style=style, opset=opset)
    report = pege_fx.verify_export(model, tmp_path / "model.onnx", [x])
    assert report.ok, report
    assert report.plain.steps < 1e-2, report


@pytest.mark.parametrize(
    ("kind", "options"), [("LSTM", {"num_layers": 2, "bidirectional": True}), ("RNN", {"nonlinearity": "relu"})]
)
def test_a_state_that_is_given(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    x, h = torch.randn(5, 2, 4), torch.randn(4 if kind == "LSTM" else 1, 2, 3)
    inputs = (x, (h, h - 1)) if kind == "LSTM" else (x, h)
    model = deployed(Recurrent(kind, **options), inputs)
    pege_fx.export_onnx(model, tmp_path / "model.onnx", inputs, dynamic_batch=False)
    report = pege_fx.verify_export(model, tmp_path / "model.onnx", [inputs])
    assert report.ok, report
    assert report.plain.steps < 1e-2, report


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_one_export_leaves_nothing_for_the_next(nonlinearity: str, tmp_path: Path) -> None:
    x = torch.randn(5, 2, 4)
    model = deployed(Recurrent("RNN", bidirectional=True, num_layers=2, nonlinearity=nonlinearity), (x,))
    written = []
    for i in range(2):
        pege_fx.export_onnx(model, tmp_path / f"{i}.onnx", (x,))
        written.append((tmp_path / f"{i}.onnx").read_bytes())
    assert written[0] == written[1]
    assert pege_fx.verify_export(model, tmp_path / "1.onnx", [x]).ok


@given(st.sampled_from([*KINDS]), OPTIONS, st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_length_and_batch_are_free(tmp_path: Path, kind: str, options: dict[str, Any], length: int, batch: int) -> None:
    x, path = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1)), tmp_path / "model.onnx"
    model = deployed(Recurrent(kind, **options), (x,))
    pege_fx.export_onnx(model, path, (x,), dynamic_shapes={"x": {0: "n", 1: "m"}})
    proto = onnx.load(path)
    assert [node.op_type for node in proto.graph.node if node.op_type in KINDS] == [kind] * options["num_layers"]
    assert [dim.dim_param for dim in proto.graph.input[0].type.tensor_type.shape.dim][:2] == ["n", "m"]
    assert pege_fx.verify_export(model, path, [x, torch.randn(length, batch, 4)]).ok


def test_length_and_batch_are_free_beside_a_state(tmp_path: Path) -> None:
    model, path = Recurrent("LSTM", num_layers=2), tmp_path / "model.onnx"

    def inputs(length: int, batch: int) -> Any:
        return torch.randn(length, batch, 4), (torch.randn(2, batch, 3), torch.randn(2, batch, 3))

    given = inputs(3, 2)
    free = {"x": {0: "length", 1: "batch"}, "state": ({1: "batch"}, {1: "batch"})}
    made = deployed(model, given)
    pege_fx.export_onnx(made, path, given, dynamic_shapes=free, dynamic_batch=False)
    sizes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(path).graph.input]
    assert sizes == [["length", "batch", 4], [2, "batch", 3], [2, "batch", 3]]
    assert pege_fx.verify_export(made, path, [given, inputs(7, 5), inputs(1, 1)]).ok
    apart = free | {"state": ({1: "other"}, {1: "batch"})}
    with pytest.raises(ExportError, match=r"other = batch|batch = other"):
        pege_fx.export_onnx(made, path, given, dynamic_shapes=apart, dynamic_batch=False)


def test_a_sequence_without_a_batch(tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    model = deployed(Recurrent("GRU", bidirectional=True), (x,))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", (x,), dynamic_shapes={"x": {0: "length"}})
    assert pege_fx.verify_export(model, tmp_path / "model.onnx", [x, torch.randn(9, 4), torch.randn(1, 4)]).ok


def test_its_weights_are_packed(tmp_path: Path) -> None:
    model = deployed(Recurrent("LSTM"), (torch.randn(5, 2, 4),))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", (torch.randn(5, 2, 4),))
    kinds = {
        tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type)
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    assert sum(kind == "INT4" for name, kind in kinds.items() if "weight" in name) == 2


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own
def test_a_projection_is_refused_by_name(tmp_path: Path) -> None:
    x = torch.randn(5, 2, 4)
    model = deployed(Recurrent("LSTM", proj_size=2), (x,))
    with pytest.raises(
        ExportError, match=r"recurrent: .*aten.lstm.input can not be written: a hidden state with a projection"
    ) as caught:
        pege_fx.export_onnx(model, tmp_path / "model.onnx", (x,))
    assert f" ({__file__}:{Recurrent.forward.__code__.co_firstlineno + 1})" in str(caught.value)
