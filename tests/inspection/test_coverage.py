"""benchmarks/coverage.py: a model of each family keeps every promise; the measure sees what is quantized and what is not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx import Coverage

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import coverage, zoo  # noqa: E402
from benchmarks.checks import CLAIMS, check, passes, share  # noqa: E402
from benchmarks.products import bits_of, grid_bits, products_of  # noqa: E402
from benchmarks.zoo import Case, Example  # noqa: E402

SUBSET = (
    "torchvision/mobilenet_v3_small",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/ssdlite320_mobilenet_v3_large",
    "torchvision/mc3_18",
    "torchvision/raft_small",
    "timm/xcit_nano_12_p16_224",
    "transformers/bert",
    "transformers/llama",
    "own/yolo",
    "own/weight norm wavenet",
    "own/mixture of experts",
)


@pytest.mark.parametrize("name", SUBSET)
def test_a_model_of_each_family(name: str) -> None:
    pytest.importorskip(name.partition("/")[0] if not name.startswith("own") else "torchvision")
    row = check(zoo.cases()[name], stop=True)
    assert row["passed"] == list(CLAIMS)
    assert coverage.is_good(row), row["missed"]


# --- the measure ------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.booleans(), st.integers(0, 2**31 - 1))
def test_a_grid_is_found_with_its_bits(bits: int, signed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, (1, 500), generator=generator)
    codes[0, :2] = torch.tensor([low, low + 2**bits - 1])
    scale = torch.rand((), generator=generator) + 0.01
    assert bits_of(codes * scale) == bits


@given(st.integers(3, 500), st.integers(0, 2**31 - 1))
def test_random_numbers_lie_on_no_grid(count: int, seed: int) -> None:
    assert bits_of(torch.randn(4, count, generator=torch.Generator().manual_seed(seed))) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_may_have_a_grid_for_each_channel(axis: int) -> None:
    codes = torch.randint(-8, 8, (6, 40))
    scales = torch.rand(codes.shape[axis]) + 0.1
    weight = codes * (scales[:, None] if axis == 0 else scales)
    assert grid_bits(weight, is_weight=True) == 4
    assert grid_bits(weight, is_weight=False) is None


def test_one_value_off_the_grid_is_seen() -> None:
    x = torch.randint(-8, 8, (1, 10_000)).float()
    x[0, 7_777] += 2.0**-7
    assert bits_of(x) is None


class _Every(nn.Module):
    """One of each kind of product, with known sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 3, groups=2), nn.ConvTranspose2d(4, 6, 2, 2, groups=2)
        self.linear = nn.Linear(6, 5)
        self.register_buffer("table", torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.up(self.conv(x)).flatten(2).transpose(1, 2))
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x @ self.table


def test_every_product_is_counted_by_its_kind() -> None:
    found, _ = products_of(_Every(), (torch.randn(3, 2, 6, 6),), {})
    counted = [(p.kind, p.macs) for p in found]
    n = 3 * 64  # images, positions after the transposed convolution
    assert counted == [
        ("convolution", 3 * 4 * 16 * 1 * 9),
        ("convolution", 3 * 4 * 16 * 3 * 4),
        ("linear", n * 6 * 5),
        ("product", n * 5 * 64),
        ("product", n * 64 * 5),
        ("constant", n * 5 * 7),
    ]
    assert not any(p.quantized for p in found)


def test_probabilities_inside_of_a_fused_attention_are_no_grid() -> None:
    class Fused(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    found, _ = products_of(Fused(), (torch.randint(-8, 8, (1, 2, 4, 8)).float(),), {})
    assert [(p.kind, p.macs, p.quantized) for p in found] == [("product", 256, True), ("product", 256, False)]


def test_a_product_that_nobody_can_count_is_no_silence() -> None:
    class Integers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch._int_mm(x, x.t())

    with pytest.raises(NotImplementedError, match="_int_mm multiplies"):
        products_of(Integers(), (torch.ones(32, 32, dtype=torch.int8),), {})


# --- rows and page ----------------------------------------------------------------------------------------------


class _Forgetful(nn.Module):
    """Code that stays Python and computes another thing at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.sum() > 1e9:
            return x
        return self.linear(x) * self.calls


def test_a_row_says_what_fails() -> None:
    row = check(Case("own/forgetful", "own", lambda: Example(_Forgetful(), (torch.randn(2, 4),))))
    assert not passes(row)
    assert "outputs differ" in row["problems"]["deepcopy"]
    page = coverage.document({**coverage.machine(), "rows": {"own/forgetful": row}}, {})
    assert "**deepcopy**: outputs differ" in page
    assert "| own | 1 | 0 | 1 | 0 |" in page


def test_what_stays_in_float_is_no_share() -> None:
    row: dict[str, Any] = check(zoo.cases()["own/gru seq2seq"])
    layers = share(row, *coverage.LAYERS)
    assert layers is not None
    assert 0.7 < layers < 0.9  # torch.gru keeps its hidden states to itself
    assert not coverage.is_good(row)


def test_the_page_is_made_from_the_results() -> None:
    result = json.loads((ROOT / "benchmarks/results/coverage.json").read_text())
    exports = json.loads((ROOT / "benchmarks/results/exports.json").read_text())
    assert (ROOT / "docs/coverage.md").read_text() == coverage.document(result, exports)


def test_the_page_says_what_was_exported_and_what_was_not() -> None:
    row = {"family": "classification", "passed": [], "problems": {}, "root rung": "symbolic"}
    rows = {f"torchvision/{name}": row for name in ("good", "wrong", "refused", "untried")}
    exports = {
        "good": {"converts": True, "verdict": "ties"},
        "wrong": {"converts": False, "verdict": "different"},
        "refused": {"error": "ExportError: no such operator"},
    }
    page = coverage.document({**coverage.machine(), "rows": rows}, exports)
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[5:8] for line in page.splitlines() if line.startswith("| ")}
    assert cells["model"] == ["converts", "exports", "verified"]
    assert cells["good"] == ["yes", "yes", "ties"]
    assert cells["wrong"] == ["**no**", "yes", "**different**"]
    assert cells["refused"] == ["–", "**no**", "–"]
    assert cells["untried"] == ["–", "–", "–"]
    assert "1 of the 3 that were tried are verified." in page


def test_a_tied_weight_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.middle, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.middle(self.embedding(x)).relu())
            return out

    plan = pege_fx.explain(Tied(), "W4A4", (torch.zeros(2, 3, dtype=torch.long),)).plan
    assert plan.parameters == 60
    assert Coverage(plan).shares["weights"] == (56, 56)
    assert [len(readers) for readers in plan.weights] == [2, 1]
