"""pege-fx export: a stored model becomes a verified ONNX file, or one line says why not."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import pege_fx
from pege_fx.__main__ import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

INPUT = ("--input", "2x4")


class Products(nn.Module):
    """Two layers, multiplied: the batches of both inputs have to fit."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.left(x) * self.right(ids.float())
        return product


class Ranked(nn.Module):
    """Calls what is not among ONNX's operators here, and reads a named result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.kthvalue(self.fc(x), 1, 1).values


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Stored models: one to be exported, one with two inputs, one that ONNX has no operator for here, two broken."""
    torch.manual_seed(0)
    one, two = torch.randn(2, 4), (torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.int64))
    small = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    made: dict[str, bytes] = {}
    for name, model, inputs in (("small", small, (one,)), ("two", Products(), two), ("ranked", Ranked(), (one,))):
        with tempfile.TemporaryDirectory() as folder, pege_fx.kernels.eager_kernels():
            path = Path(folder) / "model"
            pege_fx.save_deployed(pege_fx.convert(pege_fx.prepare(model, "W4A4", inputs)), path)
            made[name] = path.read_bytes()
    whole = made["small"]
    return made | {"cut": whole[:-9], "flipped": whole[:-1] + bytes([whole[-1] ^ 1])}


@pytest.fixture(autouse=True)
def folder(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored models in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(f"{name}.safetensors").write_bytes(content)


@pytest.mark.parametrize(("options", "opset"), [((), 21), (("--style", "qcdq"), 17), (("--opset", "25"), 25)])
def test_a_file_is_written_and_verified(options: tuple[str, ...], opset: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "small.safetensors", *INPUT, *options]) == 0
    out, err = capsys.readouterr()
    written = onnx.load("small.onnx")
    assert written.opset_import[0].version == opset
    assert out.startswith(f"small.onnx: {Path('small.onnx').stat().st_size:,} bytes, ")
    assert out.splitlines()[-1].startswith(("exact: ", "ties: "))
    assert err == ""


def test_an_input_for_each_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "two.safetensors", *INPUT, "--input", "2x4:int64", "-o", "made.onnx", "--no-verify"]) == 0
    assert [value.name for value in onnx.load("made.onnx").graph.input] == ["x", "ids"]
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_training_that_was_not_finished_is_said_at_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    """By convert, which knows the site; and from then on by whoever exports, from a file too."""
    gm = pege_fx.prepare(nn.Linear(4, 4), "W4A4", (torch.randn(2, 4),))
    pege_fx.PEGEScheduler(gm, 10, pege_fx.Constant(0.25))
    with pytest.warns(pege_fx.PegeWarning, match=r"weight_fq was trained at p = 0\.250"):
        deployed = copy.deepcopy(pege_fx.convert(gm))
    with pytest.warns(pege_fx.PegeWarning, match=r"converted at p = 0\.250, before its training was finished"):
        pege_fx.export_onnx(deployed, "early.onnx", (torch.randn(2, 4),))
    pege_fx.save_deployed(deployed, "early.safetensors")
    assert main(["export", "early.safetensors", *INPUT]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("pege-fx: warning: the model was converted at p = 0.250")
    assert err.count("\n") == 1
    assert "early.onnx: " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors", *INPUT], "there is no file none.safetensors"),
        (["cut.safetensors", *INPUT], "cut.safetensors"),
        (["flipped.safetensors", *INPUT], "flipped.safetensors"),
        (["small.safetensors", *INPUT, "--style", "qdqq"], "style='qdqq': give"),
        (["small.safetensors", *INPUT, "--opset", "3"], "opset=3: give a whole number from 17"),
        (["small.safetensors", "--input", "2x5"], "the model fails on inputs of shapes [(2, 5)]"),
        (["two.safetensors", *INPUT], "the model fails on inputs of shapes [(2, 4)]"),
        (["small.safetensors", *INPUT, "-o", "none/m.onnx"], "can not write none/m.onnx: No such file"),
        (["small.safetensors", *INPUT, "-o", "."], "can not write .: it is a folder"),
        (["small.safetensors", *INPUT, "-o", "small.safetensors"], "small.safetensors is the model itself"),
        (["ranked.safetensors", *INPUT], "kthvalue: the operator aten.kthvalue.default is not among those"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_no_file(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["export", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pege-fx: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("arguments", [["small.safetensors"], ["small.safetensors", *INPUT, "--opset", "new"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["export", *arguments])
    assert exit_.value.code == 2
    assert "usage: pege-fx export" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = pege_fx.export_onnx

    def wrong(deployed: torch.fx.GraphModule, *args: object, **options: object) -> int:
        codes = next(value for name, value in deployed.named_buffers() if name.endswith("weight_codes"))
        kept = codes.clone()
        codes.neg_()
        size: int = written(deployed, *args, **options)  # type: ignore[arg-type]
        codes.copy_(kept)
        return size

    monkeypatch.setattr(pege_fx, "export_onnx", wrong)
    assert main(["export", "small.safetensors", *INPUT]) == 1
    out, err = capsys.readouterr()
    assert "different: " in out
    assert "small.onnx does not compute what small.safetensors does" in err
