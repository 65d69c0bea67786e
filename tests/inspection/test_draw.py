"""Pictures: what the .dot says, what is refused; the layout itself only where Graphviz is installed."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import pege_fx
from pege_fx.errors import ExportError


@pytest.fixture
def gm() -> GraphModule:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return pege_fx.prepare(nn.Sequential(block, nn.ReLU(), nn.Conv2d(4, 4, 3)), "W4A4", (torch.randn(1, 3, 9, 9),))


def test_dot_has_clusters_bits_and_signs(gm: GraphModule, tmp_path: Path) -> None:
    pege_fx.draw(gm, tmp_path / "graph.dot")
    text = (tmp_path / "graph.dot").read_text()
    assert "cluster_0" in text
    assert "conv2d W4" in text
    assert 'label=" u4"' in text
    assert 'label=" s8"' in text
    assert "_fq" not in text


def test_depth_merges_a_module(gm: GraphModule, tmp_path: Path) -> None:
    pege_fx.draw(gm, tmp_path / "graph.dot", depth=0)
    text = (tmp_path / "graph.dot").read_text()
    assert "3 nodes, 2 operations" in text
    assert "cluster" not in text


@pytest.mark.parametrize("ending", ["svg", "png"])
@pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")
def test_pictures(gm: GraphModule, tmp_path: Path, ending: str) -> None:
    pege_fx.draw(gm, tmp_path / f"graph.{ending}")
    start = (tmp_path / f"graph.{ending}").read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if ending == "png" else b"<svg" in start or b"<?xml" in start


def test_without_graphviz_the_dot_is_written(gm: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=r"needs Graphviz's dot.*\n.*apt install graphviz"):
        pege_fx.draw(gm, tmp_path / "graph.svg")
    assert "digraph" in (tmp_path / "graph.dot").read_text()
    with pytest.raises(ExportError, match="can not write"):
        pege_fx.draw(gm, tmp_path / "missing" / "graph.svg")


def test_bad_arguments_are_refused(gm: GraphModule, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ending '\.gif'"):
        pege_fx.draw(gm, tmp_path / "graph.gif")
    with pytest.raises(ExportError, match="can not write"):
        pege_fx.draw(gm, tmp_path / "missing" / "graph.dot")
    with pytest.raises(ExportError, match="depth=-1"):
        pege_fx.draw(gm, tmp_path / "graph.dot", depth=-1)
