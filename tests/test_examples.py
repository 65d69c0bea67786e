"""The demo, small: it runs, says what it found, and leaves its files."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ESTIMATORS = ("ste", "ewgs", "pege")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    return load("quickstart")


@pytest.mark.filterwarnings("ignore:replacement is not complete")
@pytest.mark.parametrize(("epochs", "seeds"), [(1, 1), (2, 2)])
def test_the_quickstart_runs_and_leaves_its_files(
    quickstart: ModuleType, epochs: int, seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made" / "by the demo"
    sizes = ["--epochs", str(epochs), "--float-epochs", "1", "--seeds", str(seeds), "--subset", "200"]
    quickstart.main(["--output", str(output), *sizes])
    printed = capsys.readouterr().out
    saved = json.loads((output / "results.json").read_text())

    assert len(saved["seeds"]) == seeds
    assert saved["data"] == {"train": 140, "test": 60, "split_seed": 0}
    assert saved["settings"]["epochs"] == epochs
    assert {"python", "torch", "pege_fx"} <= saved["versions"].keys()
    assert saved["seconds"]["wall"] > 0
    for run in saved["seeds"]:
        assert 0 <= run["float"]["accuracy"] <= 1
        for estimator in ESTIMATORS:
            found = run[estimator]
            assert 0 <= found["accuracy"] <= 1
            assert found["converted"] == found["accuracy"] == found["history"][-1]["accuracy"]
            assert found["converted_equals_eval"]
            assert found["quantized_bytes"] < found["float_bytes"] / 4
            assert len(found["history"]) == epochs
            assert all(math.isfinite(row["error"]) and row["error"] > 0 for row in found["history"])
        for estimator in ("ste", "ewgs"):
            rows = run[estimator]["history"]
            assert all((row["p"], row["weight_lambda"], row["activation_lambda"]) == (1, 0, 0) for row in rows)
        first = run["pege"]["history"][0]
        assert first["p"] == pytest.approx(0.2)
        assert first["weight_lambda"] == pytest.approx(1e-8)
        assert first["activation_lambda"] == pytest.approx(1e-8)

    rows = [line for line in printed.splitlines() if line.startswith("│")]
    for row, name in zip(rows, ("float", *ESTIMATORS), strict=True):
        accuracy = saved["accuracy"][name]
        values = [run[name]["accuracy"] for run in saved["seeds"]]
        assert accuracy["mean"] == pytest.approx(sum(values) / seeds)
        assert (name if name == "float" else f"W2A2 {name.upper()}") in row
        assert f"{100 * accuracy['mean']:.2f}" in row
        assert ("±" in row) == (seeds > 1)
    assert "same outputs as eval()" in printed
    assert "folded" in printed  # the summary
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--seeds", "0"], "0 is not positive"),
        (["--subset", "50"], "give 100 or more"),
        (["--bits", "W9A2"], "from 2 to 8"),
        (["--output", __file__], "exists"),
    ],
)
def test_the_quickstart_refuses_at_once_and_says_why(
    quickstart: ModuleType, wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(["--output", str(tmp_path), *wrong])
    assert said in capsys.readouterr().err


def test_the_deployment_example_ends_in_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("sklearn", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    load("deploy").main(["--output", str(tmp_path), "--epochs", "1"])
    printed = capsys.readouterr().out
    assert printed.count("codes differ in") == 3
    assert "different:" not in printed
    styles = {f"model-{style}.onnx" for style in ("qdq", "qcdq", "qonnx")}
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors"} | styles
    accuracies = {line.split()[-2] for line in printed.splitlines()[1:6]}
    assert len(accuracies) == 1  # the same wherever it runs


@pytest.mark.filterwarnings("ignore:replacement is not complete")
def test_eight_formats_are_trained_compared_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    formats = load("formats")
    formats.main(["--output", str(tmp_path), "--seeds", "1", "--epochs", "1"])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == ["float", *(format_.name for format_ in formats.FORMATS)]
    printed = capsys.readouterr().out
    for name, (row,) in list(results.items())[1:]:
        assert name in printed
        assert row["converted_equals_eval"], name
        assert 0 < row["bytes"] < results["float"][0]["bytes"]
        assert 0 < row["error"] < 1
    assert (tmp_path / "levels.png").stat().st_size > 10_000
