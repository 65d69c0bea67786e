"""The examples that read models: they run, and leave their files."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pege_fx import QuantPolicy

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_model_is_read_from_all_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    (tmp_path / "read_model.py").write_text(
        "from torch import nn\n"
        "def small():\n"
        "    first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()\n"
        "    return nn.Sequential(*first, nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = ["--model", "read_model:small", "--input", "2x3x6x6", "--passes", "*", "--output", str(tmp_path / "out")]
    load("inspect_model").main(arguments)
    printed = capsys.readouterr().out
    for part in ("Sequential: dry run", "FoldBatchNorm", "Sequential: prepared", "Sensitivity", "At most 3.5 bits a weight"):
        assert part in printed
    assert QuantPolicy.from_toml(tmp_path / "out" / "mixed.toml").rules
    for name in ("diff.png", "sensitivity.png", "summary.json", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert len([*(tmp_path / "out").glob("graph.*")]) == 1


def test_a_pass_of_one_s_own_keeps_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    load("custom_pass").main(["--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "* _2: reads _3 instead of _1" in printed
    assert "the function is kept" in printed
    assert (tmp_path / "custom_pass.png").stat().st_size > 1000
