"""Names of what a file takes and gives; results in every form that Python has for them."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import ExportError
from pege_fx.export.outputs import flat_tensors, output_names

onnx = pytest.importorskip("onnx")

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Parts(NamedTuple):
    """A result by place and by name."""

    logits: Any
    hidden: Any = None


@dataclasses.dataclass
class Output:
    """A result by name."""

    logits: Any
    loss: Any = None


class Giving(nn.Module):
    """Gives its result in the form that it is asked for."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.fc(x))


FORMS: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "a tensor": (lambda y: y, ["output"]),
    "ordered dict": (lambda y: OrderedDict(out=y, aux=y + 1), ["out", "aux"]),
    "named tuple": (lambda y: Parts(y, (y + 1, None, y + 2)), ["logits", "hidden_0", "hidden_2"]),
    "dataclass": (lambda y: Output(y), ["logits"]),
    "nested": (lambda y: {"all": [Output(y, y + 1), Parts(y)]}, ["all_0_logits", "all_0_loss", "all_1_logits"]),
    "numbered": (lambda y: {0: y, 1: (y + 1,)}, ["0", "1_0"]),
    "as torch returns it": (lambda y: torch.sort(y), ["output_0", "output_1"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_results_in_every_form(form: str, tmp_path: Path) -> None:
    make, names = FORMS[form]
    torch.manual_seed(0)
    model = pege_fx.convert(pege_fx.prepare(Giving(make).eval(), "W4A4", (X,)))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", (X,))
    assert [value.name for value in onnx.load(tmp_path / "model.onnx").graph.output] == names
    report = pege_fx.verify_export(model, tmp_path / "model.onnx", [X])
    assert report.ok, report
    assert output_names(model(X)) == names
    assert len(flat_tensors(model(X))) == len(names)


def test_an_output_of_transformers(tmp_path: Path) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    form = Giving(lambda y: outputs.BaseModelOutput(last_hidden_state=y, attentions=(y + 1,)))
    model = pege_fx.convert(pege_fx.prepare(form.eval(), "W4A4", (X,)))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", (X,))
    found = [value.name for value in onnx.load(tmp_path / "model.onnx").graph.output]
    assert found == ["last_hidden_state", "attentions_0"]
    assert pege_fx.verify_export(model, tmp_path / "model.onnx", [X]).ok


def test_names_that_are_asked_for(tmp_path: Path) -> None:
    model = pege_fx.convert(pege_fx.prepare(Giving(lambda y: (y, y + 1)).eval(), "W4A4", (X,)))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", (X,), input_names=["features"], output_names=["fc", "more"])
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [value.name for value in graph.input] == ["features"]
    assert [value.name for value in graph.output] == ["fc", "more"]  # also where a node is called so
    assert pege_fx.verify_export(model, tmp_path / "model.onnx", [X]).ok


@pytest.mark.parametrize(
    "options",
    [
        {"input_names": ["a", "b"]},
        {"input_names": [""]},
        {"output_names": ["a"]},
        {"output_names": ["a", "a"]},
        {"output_names": ["a", 1]},
        {"input_names": ["a"], "output_names": ["a", "b"]},
    ],
)
def test_names_that_do_not_fit(options: dict[str, Any], tmp_path: Path) -> None:
    model = pege_fx.convert(pege_fx.prepare(Giving(lambda y: (y, y + 1)).eval(), "W4A4", (X,)))
    with pytest.raises(ExportError, match=r"_names=.*give"):
        pege_fx.export_onnx(model, tmp_path / "model.onnx", (X,), **options)
    assert not list(tmp_path.iterdir())
