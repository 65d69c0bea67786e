"""One table, five forms: each holds every cell, and none lets a cell become markup."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pege_fx import Listing, OutputError
from pege_fx._utils.listing import write_listing

words = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
LISTING = Listing("title", ("a", "b"), (("x.y", "1"), ("x.z", "2"), ("w", "3")), ("note",), {0: ("x", "2 rows")})


@st.composite
def listings(draw: st.DrawFn) -> Listing:
    columns = draw(st.lists(words, min_size=1, max_size=4, unique=True))
    rows = draw(st.lists(st.tuples(*[words] * len(columns)), max_size=4))
    heads = draw(st.dictionaries(st.integers(0, 3), st.tuples(*[words] * len(columns)), max_size=2))
    return Listing(draw(words), tuple(columns), tuple(rows), tuple(draw(st.lists(words, max_size=2))), heads)


@given(listings())
def test_every_form_holds_every_cell(listing: Listing) -> None:
    forms = (str(listing), listing.to_markdown(), listing.to_html(), json.dumps(listing.to_dict(), ensure_ascii=False))
    for text in forms:
        assert all(cell in text for row in (listing.columns, *listing.rows, listing.notes) for cell in row if listing.rows)
        assert listing.title in text


def test_columns_line_up_and_headings_stand_before_their_rows() -> None:
    assert str(LISTING).splitlines() == ["title", "a    b", "x    2 rows", "x.y  1", "x.z  2", "w    3", "note"]


def test_cells_are_no_markup() -> None:
    listing = Listing("<b>", ("a|b",), (("*x*|<i>",),), ("&",))
    assert "\\*x\\*\\|<i>" in listing.to_markdown()
    assert "*x*|&lt;i&gt;" in listing.to_html()
    assert "<b>" not in listing.to_html()
    assert "&amp;" in listing.to_html()


@pytest.mark.parametrize(
    ("ending", "part"), [("txt", "x.y  1"), ("md", "| x.y | 1 |"), ("json", '"a": "x.y"'), ("html", ">x.y</td>")]
)
def test_a_file_s_ending_says_its_form(tmp_path: Path, ending: str, part: str) -> None:
    write_listing(LISTING, tmp_path / f"t.{ending}")
    assert part in (tmp_path / f"t.{ending}").read_text()


def test_what_can_not_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the ending '.foo' says no format; known: .txt, .md, .json, .html"):
        write_listing(LISTING, tmp_path / "t.foo")
    with pytest.raises(OutputError, match=r"can not write .*none/t.txt: No such file"):
        write_listing(LISTING, tmp_path / "none" / "t.txt")


def wide() -> Listing:
    row = ("layer1.0.conv1", "conv2d", "4", "a verdict", "2,408,448", "rule 1: a reason in words")
    return Listing("A model", ("path", "op", "weight", "BatchNorm", "MACs", "rule or reason"), (row, row), ("note " * 30,), {})


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_narrow_terminal_breaks_no_cell(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(wide())
    shown = console.export_text()
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())
    assert all(cell in shown for cell in (*wide().columns, *wide().rows[0]))


def test_columns_without_room_stand_below_the_others_indented() -> None:
    lines = [line.plain for line in wide().narrow(50)]
    assert lines[:5] == [
        "A model",
        "path            op      weight  BatchNorm",
        "  MACs       rule or reason",
        "layer1.0.conv1  conv2d  4       a verdict",
        "  2,408,448  rule 1: a reason in words",
    ]


def test_print_fits_the_terminal_and_a_pipe_has_whole_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_a_pipe = str(wide())
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, str(wide()).splitlines())) <= 60
    assert in_a_pipe == wide().to_text()
    write_listing(wide(), tmp_path / "table.txt")  # a file is as wide as it has to be, also from a terminal
    assert (tmp_path / "table.txt").read_text() == in_a_pipe + "\n"


@given(listings(), st.integers(20, 100))
def test_no_width_loses_a_cell(listing: Listing, width: int) -> None:
    text = "\n".join(line.plain for line in listing.narrow(width))
    assert all(cell in text for row in listing.rows for cell in row)
    assert all(len(line) <= width for line in text.splitlines()) or max(listing.widths) > width - 4
