"""The command line: answers on stdout, one line on stderr for what went wrong, and the exit code a shell expects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pege_fx
from pege_fx import QuantPolicy, Rule
from pege_fx.__main__ import load_model, main, parse_input

CHILD = f"{Path(__file__).stem}_models"


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with models in the current folder."""
    code = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

def tokens():
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x

class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.head = Branch(), nn.Linear(4, 2)
    def forward(self, x):
        return self.head(self.branch(x))

made = small()
number = 3

def broken():
    raise RuntimeError("no weights here")
"""
    (tmp_path / f"{CHILD}.py").write_text(code)
    (tmp_path / f"{CHILD}_fails.py").write_text("raise ValueError('no data here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, CHILD, raising=False)


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


SMALL = f"{CHILD}:small"
IMAGE = ("--input", "2x3x6x6")


def test_explain_prints_what_the_api_says(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys, "explain", SMALL, "--policy", "W3A5", *IMAGE)
    assert (code, err) == (0, "")
    expected = pege_fx.explain(load_model(SMALL), "W3A5", (torch.randn(2, 3, 6, 6),))
    assert out == f"{expected}\n"


def test_explain_answers_for_single_modules(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "explain", SMALL, *IMAGE, "--match", "0", "--match", "1", "--match", "re:[4-9]")
    assert code == 0
    first, _, _, batch_norm, verdict, linear, *_ = out.splitlines()
    assert first.startswith("0: conv2d, 112 parameters, 3,456 multiply-accumulates, BatchNorm: folded 1")
    assert batch_norm.startswith("1: BatchNorm2d")
    assert verdict == "  folded into 0"
    assert linear.startswith("4: linear")


def test_summary_filters_and_collapses(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "summary", SMALL, *IMAGE, "--match", "4")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["4", "sign:"]  # one row, then the notes
    code, out, _ = called(capsys, "summary", SMALL, *IMAGE, "--depth", "1")
    assert out.splitlines()[1].split() == ["module", "operations", "weight", "input", "parameters", "MACs"]


@pytest.mark.parametrize("command", ["explain", "summary", "coverage"])
@pytest.mark.parametrize("ending", ["txt", "md", "json", "html"])
def test_output_is_written_by_its_ending(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, ending: str) -> None:
    path = tmp_path / f"out.{ending}"
    assert called(capsys, command, SMALL, *IMAGE, "--output", str(path)) == (0, "", "")
    text = path.read_text()
    if ending == "json":
        assert json.loads(text)["model"] == "Sequential"
    else:
        assert "Sequential" in text


def test_coverage_says_shares_rungs_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys, "coverage", f"{CHILD}:Outer", "--policy", "W4A4", "--input", "2x4")
    assert code == 0
    assert "branch" in out
    assert "Python" in out
    assert "% quantized" in out
    assert err.startswith("pege-fx: warning: branch stays Python: ")
    assert err.count("\n") == 1


def test_coverage_counts_an_operation_with_a_float_factor_as_float(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    QuantPolicy((Rule(weight="4", input="4"), Rule(match="4", input=None))).to_toml(tmp_path / "p.toml")
    code, out, _ = called(capsys, "coverage", SMALL, "--policy", "p.toml", *IMAGE)
    assert code == 0
    macs = 2 * 4 * 4 * 4 * 27, 2 * 2 * 64
    assert f"MACs: {100 * macs[0] / sum(macs):.1f} % quantized, {macs[0]:,} of {sum(macs):,}" in out
    assert "input: float by the policy" in out


def test_policies_come_from_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    policy = QuantPolicy((Rule(weight="2"),))
    policy.to_toml(tmp_path / "p.toml")
    (tmp_path / "p.json").write_text(policy.to_json())
    for name in ("p.toml", "p.json"):
        code, out, _ = called(capsys, "explain", SMALL, "--policy", name)
        assert code == 0
        assert "Rule(weight='2')" in out


def test_inputs_have_shapes_and_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(capsys, "explain", f"{CHILD}:tokens", "--input", "2x5:int64")[0] == 0
    first, second = parse_input("[3x4,5:int32]")
    assert (first.shape, second.shape, second.dtype) == ((3, 4), (5,), torch.int32)


def test_models_of_torchvision_have_the_input_that_they_document(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    first = ("explain", "torchvision:squeezenet1_1", "--match", "features.0")
    _, documented, _ = called(capsys, *first)
    assert f"{64 * 27 * 111**2:,} multiply-accumulates" in documented  # of an image of 224 x 224
    _, given, _ = called(capsys, *first, "--input", "1x3x65x65")
    assert f"{64 * 27 * 32**2:,} multiply-accumulates" in given


def test_answers_for_single_modules_are_written_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("explain", SMALL, *IMAGE, "--match", "0", "--match", "1")
    assert called(capsys, *arguments, "-o", "found.txt")[:2] == (0, "")
    _, printed, _ = called(capsys, *arguments)
    assert (tmp_path / "found.txt").read_text() == printed
    assert len(printed.splitlines()) > 3


def test_an_instance_is_a_model_too() -> None:
    assert isinstance(load_model(f"{CHILD}:made"), nn.Sequential)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "resnet18"], "'resnet18' names no model: write torchvision:NAME, timm:NAME or package.module:function"),
        (["explain", "torchvision:resnt18"], "torchvision has no model 'resnt18'; closest: resnet18"),
        (["explain", "no_such_package.m:f"], "can not import no_such_package.m: No module named 'no_such_package'"),
        (["explain", f"{CHILD}:smal"], f"{CHILD} has no 'smal'; closest: small"),
        (["explain", f"{CHILD}:number"], "is a int, not an nn.Module"),
        (["explain", f"{CHILD}:broken"], "fails: RuntimeError: no weights here"),
        (["explain", SMALL, "--policy", "X4"], "'X4' is not a policy in short"),
        (["explain", SMALL, "--policy", "none.toml"], "can not read the policy none.toml"),
        (["explain", SMALL, "--policy", "none.json"], "can not read the policy none.json: No such file"),
        (["explain", SMALL, *IMAGE, "--match", "conv"], "no operation, module or node is called 'conv'; closest"),
        (["explain", SMALL, *IMAGE, "--match", "0", "-o", "none/out.txt"], "can not write none/out.txt: No such file"),
        (["summary", SMALL, *IMAGE, "--match", "conv*"], "selects none of 2 operations; closest"),
        (["summary", SMALL, "--input", "2x4x6x6"], "the model fails on the example inputs"),
        (["summary", SMALL, *IMAGE, "-o", "out.foo"], "out.foo: the ending '.foo' says no format"),
        (["summary", SMALL, *IMAGE, "-o", "none/out.md"], "can not write none/out.md: No such file"),
        (["summary", SMALL, *IMAGE, "--depth", "0"], "depth=0: give a whole number"),
        (["explain", f"{CHILD}_fails:f"], f"can not import {CHILD}_fails: ValueError: no data here"),
        (["draw", SMALL, *IMAGE, "-o", "g.gif"], "'g.gif' has the ending '.gif': give one of .svg, .png, .dot"),
        (["draw", SMALL, *IMAGE, "-o", "none/g.dot"], "can not write none/g.dot: No such file"),
        (["report", SMALL, *IMAGE, "-o", "r.txt"], "'r.txt' has the ending '.txt': a report ends in .html"),
        (["report", SMALL, *IMAGE, "-o", "none/r.html"], "can not write none/r.html: No such file"),
        (["report", SMALL, *IMAGE, "--history", "none.csv"], "can not read the history none.csv: No such file"),
    ],
)
def test_what_goes_wrong_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = called(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("pege-fx: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_policy_that_is_no_text_is_one_line_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text('{"rules": []}', encoding="utf-16")
    code, _, err = called(capsys, "explain", SMALL, "--policy", str(tmp_path / "policy.json"))
    assert (code, err.count("\n")) == (1, 1)
    assert "can't decode byte" in err


@pytest.mark.parametrize(
    "arguments",
    [[], ["paint", SMALL], ["explain"], ["explain", SMALL, "--input", "3y4"], ["explain", SMALL, "--input", "2:int99"]],
)
def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: pege-fx" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setattr("pege_fx.__main__.load_model", interrupted)
    assert main(["explain", SMALL]) == 130


def test_draw_writes_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert called(capsys, "draw", SMALL, *IMAGE, "-o", str(tmp_path / "g.dot"))[0] == 0
    assert (tmp_path / "g.dot").stat().st_size > 0


def test_report_writes_a_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert called(capsys, "report", SMALL, *IMAGE, "-o", str(tmp_path / "r.html"))[0] == 0
    assert "<html" in (tmp_path / "r.html").read_text().lower()


def test_the_module_runs_and_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m pege_fx explain {SMALL} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Sequential: dry run\n", "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["explain", "--help"], ["--version"], ["explain", "model", "--batch-norm", "none"], []]
)
def test_help_and_wrong_usage_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from pege_fx_cli import main
try:
    main({arguments!r})
finally:
    assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "torch was imported" not in done.stderr
    assert ("usage: pege-fx" in done.stdout + done.stderr) != (arguments == ["--version"])
