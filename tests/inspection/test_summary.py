"""Tables and sizes: what a person reads is what the plan says, in plain text and in colour."""

import io
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import Listing, ModelError, QuantPolicy, QuantSpec, Rule, SizeReport


class Net(nn.Module):
    """A convolution with BatchNorm, a convolution without, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.conv2(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
        return out


POLICY = QuantPolicy(
    (
        Rule(weight="4", input="4"),
        Rule(match="re:[a-z]+2", weight=QuantSpec(bits=2, estimator="ste"), input=QuantSpec(bits=3, method="pact")),
        Rule(match="fc", input=None),
    )
)


X = (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)


def prepared() -> GraphModule:
    torch.manual_seed(0)
    return pege_fx.prepare(Net(), POLICY, X)


def cells(listing: Listing) -> dict[str, dict[str, str]]:
    """Rows by path, cells by column."""
    return {row[0]: dict(zip(listing.columns, row, strict=True)) for row in listing.rows}


def test_a_summary_says_what_became_of_each_operation() -> None:
    found = cells(pege_fx.summary(prepared()).listing)
    assert list(found) == ["conv1", "conv2", "fc"]
    columns = ("op", "weight", "input", "sign", "method", "estimator", "parameters")
    assert [tuple(row[name] for name in columns) for row in found.values()] == [
        ("conv2d", "4", "4", "s/s", "lsq", "pege", "108"),
        ("conv2d", "2", "3", "s/u", "lsq/pact", "ste/pege", "25"),
        ("linear", "4", "float", "s", "lsq", "pege", "12"),
    ]
    assert found["conv1"]["BatchNorm"] == "folded bn1"
    assert found["conv2"]["BatchNorm"] == found["fc"]["BatchNorm"] == "-"
    for path, numbers in (("conv1", "0"), ("conv2", "1"), ("fc", "02")):
        assert all(f"rule {number}" in found[path]["rule or reason"] for number in numbers)


@pytest.mark.parametrize("made", [lambda: pege_fx.summary(prepared()), lambda: pege_fx.explain(Net(), POLICY)])
def test_plain_text_holds_every_cell_and_every_rule(made: object) -> None:
    assert callable(made)
    shown = made()
    listing = getattr(shown, "listing", shown)
    text = str(shown)
    for row in listing.rows:
        assert any(all(cell in line for cell in row) for line in text.splitlines())
    assert all(column in text for column in listing.columns)
    assert "5 of 6 edges quantized" in text
    assert "\x1b" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())
    unwrapped = " ".join(text.split())
    assert all(f"rule {number}: {rule!r}" in unwrapped for number, rule in enumerate(POLICY.rules))


def test_explain_is_what_prepare_does() -> None:
    assert pege_fx.explain(Net(), POLICY, X).listing.rows == pege_fx.summary(prepared()).listing.rows


def rich_text(shown: object) -> str:
    out = io.StringIO()
    Console(file=out, width=250, color_system=None).print(shown)
    return out.getvalue()


def test_a_terminal_shows_the_same_words() -> None:
    listing = pege_fx.summary(prepared())
    words = rich_text(listing).split()
    assert words == str(listing).split()


@pytest.mark.parametrize("text", ["re:[a-z]+", "a[/b]", "[bold]x", "re:[red]", ":smile:"])
def test_brackets_are_text_and_no_markup(text: str) -> None:
    listing = Listing(f"title {text}", ("column",), ((text,),), (f"note {text}",))
    for shown in (str(listing), rich_text(listing)):
        assert shown.count(text) == 3


def test_one_operation_is_found_by_its_path_or_node() -> None:
    explanation = pege_fx.explain(Net(), POLICY)
    assert explanation["conv2"].edge("weight").spec.bits == 2  # type: ignore[union-attr]
    assert explanation[explanation["conv2"].node] is explanation["conv2"]
    assert explanation["conv2"].edge("output") is None
    with pytest.raises(ModelError, match=r"no operation, module or node is called 'conv3'; closest: conv[12]"):
        explanation["conv3"]


def test_a_float_edge_says_why() -> None:
    explanation = pege_fx.explain(Net(), QuantPolicy((Rule(match="conv1", weight="4"),)))
    reasons = {op.path: {edge.operand: edge.reason for edge in op.edges} for op in explanation.plan.operations}
    assert reasons["conv1"]["weight"] == ""
    assert reasons["fc"]["weight"] == "no rule sets it"
    assert "no rule sets it" in cells(explanation.listing)["fc"]["rule or reason"]


def test_a_summary_of_a_model_that_was_not_prepared_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Net was not prepared: call pege_fx.prepare\(model, policy\) first"):
        pege_fx.summary(Net())  # type: ignore[arg-type]


# --- size --------------------------------------------------------------------------------------------------------


def test_a_size_counts_codes_by_their_bits_and_everything_else_in_full() -> None:
    report = pege_fx.size_report(pege_fx.convert(prepared()))
    weights = 108 + 20 + 10
    biases = 4 + 5 + 2  # the first from the folded BatchNorm
    assert report.float_bytes == 4 * (weights + biases)
    codes = 108 * 4 // 8 + 20 * 2 // 8 + 10 * 4 // 8
    grids = 4 + 5 + 2 + 2  # one scale per output channel, and one for each of two activations
    assert report.quantized_bytes == codes + 4 * (biases + grids)


def test_a_size_rounds_each_weight_up_to_bytes() -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(3, 1, bias=False)), QuantPolicy((Rule(weight="3"),)))
    report = pege_fx.size_report(pege_fx.convert(gm))
    assert report == SizeReport(float_bytes=12, quantized_bytes=2 + 4)  # 9 bits, and a scale


def test_what_is_not_quantized_has_one_size() -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    held = sum(value.numel() * value.element_size() for value in gm.state_dict().values())
    report = pege_fx.size_report(gm)
    assert report == SizeReport(held, held)
    assert report.ratio == 1.0


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (SizeReport(0, 0), "float 0 bytes, quantized 0 bytes: 1.0 times smaller"),
        (SizeReport(2048, 512), "float 2.0 KiB, quantized 512 bytes: 4.0 times smaller"),
        (SizeReport(5 * 2**30, 3 * 2**20), "float 5.0 GiB, quantized 3.0 MiB: 1706.7 times smaller"),
    ],
)
def test_sizes_print_in_the_unit_that_reads_best(report: SizeReport, text: str) -> None:
    assert str(report) == text


# --- answers for what is no operation -------------------------------------------------------------------------------


class Gate(nn.Module):
    """Stays Python, with two layers inside; nothing calls the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.unused = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y if y.mean() > 0 else x


@pytest.mark.parametrize("look", [pege_fx.explain, lambda *given: pege_fx.summary(pege_fx.prepare(*given))])
def test_every_module_has_an_answer(look: Callable[..., pege_fx.Summary]) -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.warns(pege_fx.PegeWarning, match="stays Python"):
        seen = look(nn.Sequential(OrderedDict(stem=stem, gate=Gate())), "W4A4", (torch.randn(2, 3, 4, 4),))
    assert str(seen["stem"]).startswith(
        "stem: module with 1 operation, 16 parameters, 384 multiply-accumulates\n  stem.0: conv2d"
    )
    assert seen["stem.1"].reason == "folded into stem.0"
    assert seen["stem.2"].reason.startswith("not quantized itself")
    stays, *inside = str(seen["gate"]).splitlines()[1:]
    assert stays.startswith("  stays Python: ")
    assert "test_summary.py" in stays
    assert inside[0].startswith("  gate.conv: conv2d")
    assert seen["gate.norm"].reason.startswith("runs inside gate, which stays Python: ")
    with pytest.raises(ModelError, match=r"no operation, module or node is called 'gate.cnv'; closest: gate.conv"):
        seen["gate.cnv"]
    whole = look(nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), pool=Pooled())), "W4A4", (torch.randn(2, 3, 4, 4),))
    assert whole["pool.unused"].reason == "not in the graph: nothing calls it by itself"


class Pooled(nn.Module):
    """Does not call its only module."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
