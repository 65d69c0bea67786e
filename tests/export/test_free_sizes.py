"""Sizes that stay free: asked for, or by default; never one that decided what the graph is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

import pege_fx
from pege_fx import ExportError, PegeWarning

onnx = pytest.importorskip("onnx")

IDS = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    """A model of tokens that takes any length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.fc(self.embedding(ids)).relu()
        out: Tensor = self.head(y if mask is None else y * mask.unsqueeze(-1))
        return out


def tagger(*args: Any) -> GraphModule:
    return pege_fx.convert(pege_fx.prepare(Tagger().eval(), "W4A4", args))


def sizes(path: Path, name: str) -> list[Any]:
    graph = onnx.load(path).graph
    (value,) = (value for value in (*graph.input, *graph.output) if value.name == name)
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_batch_and_length_of_tokens_are_free(tmp_path: Path) -> None:
    model, path = tagger(IDS), tmp_path / "model.onnx"
    pege_fx.export_onnx(model, path, (IDS[:1],))
    assert sizes(path, "ids") == ["batch", "length"]
    assert sizes(path, "output") == ["batch", "length", 3]
    assert pege_fx.verify_export(model, path, [IDS, IDS[:, :5], IDS[:1, :1]]).ok
    pege_fx.export_onnx(model, path, (IDS,), dynamic_batch=False)
    assert sizes(path, "ids") == [2, 7]


@pytest.mark.parametrize(
    "asked",
    [
        {"ids": {1: "n"}, "mask": {1: "n"}},
        {"ids": {-1: "n"}, "mask": (None, "n")},
        ({1: Dim("n")}, {1: Dim("n")}),
        [("batch", "n"), ["batch", "n"]],
    ],
)
def test_sizes_that_are_asked_for(asked: Any, tmp_path: Path) -> None:
    mask = (IDS > 5).float()
    model, path = tagger(IDS, mask), tmp_path / "model.onnx"
    pege_fx.export_onnx(model, path, (IDS, mask), dynamic_shapes=asked)
    assert sizes(path, "ids") == sizes(path, "mask") == ["batch", "n"]
    assert sizes(path, "output") == ["batch", "n", 3]
    assert pege_fx.verify_export(model, path, [(IDS, mask), (IDS[:1, :3], mask[:1, :3])]).ok
    program = pege_fx.to_program(model, (IDS, mask), dynamic_shapes=asked)
    assert torch.equal(program.module()(IDS[:, :4], mask[:, :4]), model(IDS[:, :4], mask[:, :4]))


def test_sizes_that_torch_may_choose(tmp_path: Path) -> None:
    model, path = tagger(IDS), tmp_path / "model.onnx"
    pege_fx.export_onnx(model, path, (IDS,), dynamic_shapes=({0: Dim.STATIC, 1: Dim.AUTO},))
    assert sizes(path, "ids")[0] == 2
    assert pege_fx.verify_export(model, path, [IDS[:, :3]]).ok


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tokens": {1: "n"}}, r"dynamic_shapes={'tokens': {1: 'n'}}: give a dict by parameter \(ids, mask\)"),
        ("n", "give a dict by parameter"),
        ({"ids": {4: "n"}}, "ids has 2 dimensions, and no dimension 4"),
        ({"ids": "n"}, "ids is 'n': give its free sizes by dimension"),
        ({"ids": {1: "two words"}}, "a size named 'two words'"),
        ({"ids": {1: 2.5}}, "a size 2.5: give a torch.export.Dim"),
        ({"ids": {1: "n"}, "mask": {1: "m"}}, "m = n|n = m"),
        ({"mask": {0: "n", 1: "m"}}, "mask is no tensor"),
    ],
)
def test_sizes_that_can_not_be_free(asked: Any, message: str, tmp_path: Path) -> None:
    mask = None if "no tensor" in message else torch.ones(2, 7)
    model = tagger(IDS, mask)
    with pytest.raises(ExportError, match=message):
        pege_fx.export_onnx(model, tmp_path / "model.onnx", (IDS, mask), dynamic_shapes=asked)
    assert not list(tmp_path.iterdir())


def test_an_example_of_one_says_nothing_of_more(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ids has one in dimension 1, which torch.export fixes: give an example with more"):
        pege_fx.export_onnx(tagger(IDS), tmp_path / "model.onnx", (IDS[:, :1],), dynamic_shapes={"ids": {1: "n"}})


class Pyramid(nn.Module):
    """A segmenter of images of any size: pools, a resize to the input's size, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 4, 1)
        self.norm, self.fc = nn.GroupNorm(2, 6), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.up(nn.functional.max_pool2d(self.norm(self.down(x)).relu(), 2, ceil_mode=True))
        wide = nn.functional.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
        tokens = self.fc(y.flatten(2).transpose(1, 2))
        return {"out": wide, "tokens": tokens, "mean": tokens.mean(1), "spread": y.var((2, 3)), "pooled": y.mean((2, 3))}


def test_images_of_every_size(tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 16, 20), tmp_path / "model.onnx"
    model = pege_fx.convert(pege_fx.prepare(Pyramid().eval(), "W4A4", (x,)))
    pege_fx.export_onnx(model, path, (x,), dynamic_shapes={"x": {2: "height", 3: "width"}})
    assert sizes(path, "x") == ["batch", 3, "height", "width"]
    assert sizes(path, "out") == ["batch", 4, "height", "width"]
    others = [x, torch.randn(1, 3, 12, 12), torch.randn(3, 3, 33, 17)]
    assert pege_fx.verify_export(model, path, others).ok


class Attending(nn.Module):
    """Causal attention over any number of tokens, with positions that are counted, and halves of the length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions, self.qkv, self.head = (
            nn.Embedding(20, 8), nn.Embedding(64, 8), nn.Linear(8, 24), nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        length = ids.shape[1]
        x = self.embedding(ids) + self.positions(torch.arange(length))
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        first = y[:, : -(-length // 2)]
        return self.head(y), first.sum(1)


def test_causal_attention_over_any_length(tmp_path: Path) -> None:
    model, path = pege_fx.convert(pege_fx.prepare(Attending().eval(), "W4A4", (IDS,))), tmp_path / "model.onnx"
    pege_fx.export_onnx(model, path, (IDS,))
    assert sizes(path, "ids") == ["batch", "length"]
    assert pege_fx.verify_export(model, path, [IDS, IDS[:, :2], IDS[:1, :5]]).ok


class Choosing(nn.Module):
    """Python that chooses by a size. What it asks of a value keeps it out of the graph."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        if y.requires_grad and float(y.sum()) > 1e9:
            return y
        count = x.shape[0]
        if self.kind == "more":
            return y + 1 if count > 3 else y - 1
        if self.kind == "even":
            return y + 1 if count % 2 == 0 else y - 1
        if self.kind == "five":
            return y - 1 if count == 5 else y + 1
        if self.kind == "pairs":
            return y.view(count // 2, 2, 4)
        return y + count if count else y


@pytest.mark.filterwarnings("ignore:the model stays Python", "ignore:.*stays Python")
@pytest.mark.parametrize("kind", ["more", "even", "five", "pairs", "any"])
def test_a_size_that_decides_is_not_free(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    x, path = torch.randn(6, 4), tmp_path / "model.onnx"
    model = pege_fx.convert(pege_fx.prepare(Choosing(kind).eval(), "W4A4", (x,)))
    recwarn.clear()
    pege_fx.export_onnx(model, path, (x,))
    said = " ".join(str(warning.message) for warning in recwarn if issubclass(warning.category, PegeWarning))
    if kind in ("pairs", "any"):
        assert sizes(path, "x") == ["batch", 4]
        assert pege_fx.verify_export(model, path, [x, x[:4], x[:2]]).ok
    else:
        assert re.search("batch size is fixed to that of the example inputs: the model chooses by it", said), said
        assert sizes(path, "x") == [6, 4]
        with pytest.raises(ExportError, match=r"Not all values of n|the model chooses by it"):
            pege_fx.export_onnx(model, path, (x,), dynamic_shapes={"x": {0: "n"}})
    assert pege_fx.verify_export(model, path, [x]).ok


class Assigning(nn.Module):
    """Assignment to a slice of a dimension whose size may be free: one number, or what stood there, doubled."""

    def __init__(self, where: slice, by: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.where, self.by = nn.Linear(4, 4), where, by

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        y[:, self.where] = y[:, self.where] * 2 if self.by is None else self.by
        y[:, -1, 0] = 3.0
        return y


ENDS = st.none() | st.integers(-8, 8)


@given(where=st.builds(slice, ENDS, ENDS, st.integers(1, 4)), by=st.none() | st.just(0.5))
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(where=slice(-1, None, 2), by=None)
def test_assignment_to_any_slice(tmp_path: Path, where: slice, by: float | None) -> None:
    x, path = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), tmp_path / "model.onnx"
    model = pege_fx.convert(pege_fx.prepare(Assigning(where, by).eval(), "W4A4", (x,)))
    pege_fx.export_onnx(model, path, (x,))
    assert pege_fx.verify_export(model, path, [x, x[:1]]).ok


@pytest.mark.parametrize("where", [slice(-5, -1, 2), slice(None, None, 2)], ids=str)
def test_assignment_to_a_slice_of_a_free_size(where: slice, tmp_path: Path) -> None:
    x, path = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), tmp_path / "model.onnx"
    model = pege_fx.convert(pege_fx.prepare(Assigning(where, None).eval(), "W4A4", (x,)))
    pege_fx.export_onnx(model, path, (x,), dynamic_shapes={"x": {1: "n"}})
    assert sizes(path, "x") == ["batch", "n", 4]
    assert pege_fx.verify_export(model, path, [x, torch.randn(3, 9, 4)]).ok
