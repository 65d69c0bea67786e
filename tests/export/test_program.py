"""The converted graph in PyTorch's own formats: torch.export, PT2E's operators, traces, compiled."""

import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import ExportError, QuantPolicy, testing
from pege_fx.modules.fixed_attributes import FixedAttributes

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def deployed(method: str = "lsq", **options: Any) -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.GELU(), nn.Flatten(),
        nn.Linear(256, 5),
    )  # fmt: skip
    gm = pege_fx.prepare(testing.as_trained(model, 0).eval(), QuantPolicy.parse("W4A4", method=method), (X,))
    return pege_fx.convert(gm, **options)


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"integer_bias": True}])
@pytest.mark.parametrize("operators", ["aten", "pege_fx"])
def test_programs_give_the_same_answers(operators: Any, options: dict[str, bool]) -> None:
    model = deployed(**options)
    program = pege_fx.to_program(model, (X[:1],), operators=operators)
    for x in (X, X[:1], X[:3]):
        assert torch.equal(program.module()(x), model(x))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("pege_fx" in name for name in names) is (operators == "pege_fx")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's own
def test_a_program_is_saved_and_read() -> None:
    model, file = deployed(), io.BytesIO()
    torch.export.save(pege_fx.to_program(model, (X,)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(X), model(X))


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_takes_the_graph_as_it_is(strict: bool) -> None:
    model = deployed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        program = torch.export.export(model, (X,), strict=strict)
    assert torch.equal(program.module()(X), model(X))


@pytest.mark.parametrize("method", ["lsq", "minmax", "dorefa", "interval"])
def test_pt2e_operators(method: str) -> None:
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    model = deployed(method)
    program = pege_fx.to_program(model, (X,), operators="quantized_decomposed")
    names = [str(node.target) for node in program.graph.nodes]
    assert "quantized_decomposed.quantize_per_tensor.tensor" in names
    if method == "lsq":
        assert "quantized_decomposed.dequantize_per_channel.default" in names
    parted = (program.module()(X) - model(X)).abs() > 1e-4
    assert float(parted.float().mean()) < 0.5  # 1 / s moves ties by a code


def test_unknown_operators() -> None:
    with pytest.raises(ExportError, match="operators='onnx': give"):
        pege_fx.to_program(deployed(), (X,), operators="onnx")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and says so in many ways
def test_a_trace_gives_the_same_answers() -> None:
    model, file = deployed(), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, X), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(X[:2]), model(X[:2]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_ahead_of_time_and_just_in_time(tmp_path: Path) -> None:
    """An AOTInductor package, and ``torch.compile``: inductor's GELU may round another way, and every code is the model's."""
    from torch import _inductor as inductor  # where torch's documentation has the two functions

    model = deployed(packed=True)
    path = inductor.aoti_compile_and_package(pege_fx.to_program(model, (X,)), package_path=str(tmp_path / "model.pt2"))
    testing.assert_same_function(model, inductor.aoti_load_package(path), (X,))
    testing.assert_same_function(model, torch.compile(model, fullgraph=True), (X,))


def test_what_held_a_weight_is_a_plain_module() -> None:
    held = [module for path, module in deployed().named_modules() if path]
    assert held
    for module in held:  # the class that refuses assignments of what is fixed has no code to call, either
        assert type(module) is nn.Module or type(module).__bases__ == (FixedAttributes, nn.Module)
        assert type(module).forward is nn.Module.forward
