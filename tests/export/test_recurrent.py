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

pytestmark = pytest.mark.filterwarnings("ignore:the batch size of x is fixed")  # the first dimension is the sequence's

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


def write(*args: Any, **options: Any) -> None:
    try:
        pege_fx.export_onnx(*args, **options)
    except ExportError as error:
        if "a newer torch" in str(error):
            pytest.skip("torch 2.11 describes states wrongly, and the exporter says so")
        raise


OPTIONS = st.fixed_dictionaries(
    {"num_layers": st.integers(1, 3), "bidirectional": st.booleans(), "batch_first": st.booleans(), "bias": st.booleans()}
)


@given(st.sampled_from([*KINDS]), OPTIONS, st.sampled_from([("qdq", None), ("qdq", 25), ("qcdq", 17), ("qonnx", None)]))
@settings(max_examples=settings.default.max_examples // 2, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_recurrent_layers_are_exported(tmp_path: Path, kind: str, options: dict[str, Any], form: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    model = deployed(Recurrent(kind, **options), (x,), "2")
    style, opset = form
    write(model, tmp_path / "model.onnx", (x,), style=style, opset=opset)
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
    write(model, tmp_path / "model.onnx", inputs, dynamic_batch=False)
    report = pege_fx.verify_export(model, tmp_path / "model.onnx", [inputs])
    assert report.ok, report
    assert report.plain.steps < 1e-2, report


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_one_export_leaves_nothing_for_the_next(nonlinearity: str, tmp_path: Path) -> None:
    x = torch.randn(5, 2, 4)
    model = deployed(Recurrent("RNN", bidirectional=True, num_layers=2, nonlinearity=nonlinearity), (x,))
    written = []
    for i in range(2):
        write(model, tmp_path / f"{i}.onnx", (x,))
        written.append((tmp_path / f"{i}.onnx").read_bytes())
    assert written[0] == written[1]
    assert pege_fx.verify_export(model, tmp_path / "1.onnx", [x]).ok


def test_its_weights_are_packed(tmp_path: Path) -> None:
    model = deployed(Recurrent("LSTM"), (torch.randn(5, 2, 4),))
    write(model, tmp_path / "model.onnx", (torch.randn(5, 2, 4),))
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
