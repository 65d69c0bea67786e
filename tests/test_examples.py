"""The demo, small: it runs, says what it found, and leaves its files."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:replacement is not complete")
def test_the_deployment_example_ends_in_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("sklearn", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    load("deploy").main(["--output", str(tmp_path), "--epochs", "1"])
    printed = capsys.readouterr().out
    assert printed.count("codes differ in") == 2
    assert "different:" not in printed
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "model-qdq.onnx", "model-qcdq.onnx"}
    accuracies = {line.split()[-2] for line in printed.splitlines()[1:6]}
    assert len(accuracies) == 1  # the same wherever it runs


@pytest.mark.filterwarnings("ignore:replacement is not complete")
def test_the_quickstart_runs_and_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    arguments = ["--output", str(tmp_path), "--epochs", "2", "--float-epochs", "1", "--seeds", "2", "--subset", "300"]
    load("quickstart").main(arguments)
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved["seeds"]) == 2
    for run in saved["seeds"]:
        for estimator in ("ste", "ewgs", "pege"):
            assert estimator.upper() in printed
            assert 0 <= run[estimator]["accuracy"] <= 1
            assert run[estimator]["converted"] == run[estimator]["accuracy"]
            assert run[estimator]["quantized_bytes"] < run[estimator]["float_bytes"] / 4
            assert len(run[estimator]["history"]) == 2
        rates = [row["p"] for row in run["pege"]["history"]]
        assert rates[0] < 1
        assert run["ste"]["history"][0]["p"] == 1
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "folded" in printed  # the summary
