"""Embedding bags: what ONNX is written from is what torch computes, and files give the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx import ExportError
from pege_fx.export.embedding import embedding_bag

ROWS = 10


@st.composite
def bags(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Indices, offsets of one-dimensional ones (bags may be empty), and settings."""
    options: dict[str, Any] = {"mode": draw(st.sampled_from(["sum", "mean", "max"]))}
    options["padding_idx"] = draw(st.none() | st.integers(-ROWS, ROWS - 1))
    if draw(st.booleans()):
        size, offsets = (draw(st.integers(0, 4)), draw(st.integers(1, 4))), None
    else:
        size = (draw(st.integers(0, 8)),)
        starts = [0, *sorted(draw(st.lists(st.integers(0, size[0]), max_size=4)))]
        options["include_last_offset"] = draw(st.booleans())
        offsets = torch.tensor([*starts, size[0]] if options["include_last_offset"] else starts)
    indices = torch.randint(0, ROWS, size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if options["mode"] == "sum" and draw(st.booleans()):
        options["per_sample_weights"] = torch.linspace(-1, 1, indices.numel()).reshape(indices.shape)
    return indices, offsets, options


@given(bags())
def test_a_bag_is_what_torch_says(case: tuple[Tensor, Tensor | None, dict[str, Any]]) -> None:
    indices, offsets, options = case
    weight = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
    expected = F.embedding_bag(indices, weight, offsets, **options)
    torch.testing.assert_close(embedding_bag(indices, weight, offsets, **options), expected)


class Bags(nn.Module):
    """Bags of one length, and of any."""

    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even, self.any = (nn.EmbeddingBag(ROWS, 8, mode=mode, padding_idx=3, **options) for _ in range(2))
        self.fc = nn.Linear(8, 3)

    def forward(self, even: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return self.fc(self.even(even) + self.any(indices, offsets))


INPUTS = (torch.tensor([[1, 2, 3], [3, 3, 3], [4, 9, 4]]), torch.tensor([3, 1, 2, 7, 8, 8, 0]), torch.tensor([0, 3, 3]))


@pytest.mark.parametrize(("mode", "style"), [("sum", "qdq"), ("mean", "qcdq"), ("max", "qonnx")])
def test_bags_are_exported(mode: str, style: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = pege_fx.convert(pege_fx.prepare(Bags(mode).eval(), "W4A4", INPUTS))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", INPUTS, style=style)
    fewer = (INPUTS[0][:2], INPUTS[1][:5], INPUTS[2][:2])
    report = pege_fx.verify_export(model, tmp_path / "model.onnx", [INPUTS, fewer])
    assert report.verdict == "exact", report


def test_a_bag_that_changes_its_weight_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = pege_fx.convert(pege_fx.prepare(Bags("mean", max_norm=1.0).eval(), "W4A4", INPUTS))
    with pytest.raises(ExportError, match="max_norm changes its weight when it runs: renormalize"):
        pege_fx.export_onnx(model, tmp_path / "model.onnx", INPUTS)
