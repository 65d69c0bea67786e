"""The pages about the architecture are made from the code: what they say is what it is."""

import runpy
from pathlib import Path

import pytest

import pege_fx
from pege_fx import api

ROOT = Path(__file__).parents[1]
made = runpy.run_path(str(ROOT / "docs" / "theme" / "architecture.py"))


@pytest.mark.parametrize("name", made["pages"]())
def test_a_page_is_what_the_code_makes_of_it(name: str) -> None:
    assert (ROOT / name).read_text() == made["pages"]()[name], "run python docs/theme/architecture.py"


def test_every_pass_has_a_row_and_a_box() -> None:
    page, drawing = ((ROOT / name).read_text() for name in ("docs/architecture.md", made["SVG"]))
    for step in (*api.steps_of_prepare(pege_fx.prepare_passes("W4A4")), *pege_fx.convert_passes()):
        name = getattr(step, "__name__", type(step).__name__)
        assert f"| `{name}` |" in page
        assert f">{name}</text>" in drawing


def test_every_layer_and_pass_says_what_it_is() -> None:
    for rows in (made["layers"](), made["passes"](api.steps_of_prepare(pege_fx.prepare_passes("W4A4")))):
        assert all(len(row.split("|")[3].strip()) > 10 for row in list(rows)[2:])


def test_the_first_sentence_is_not_cut_in_a_word() -> None:
    assert made["first_sentence"]("What ``pege_fx.diff`` is. And more.\n\nMore.") == "What `pege_fx.diff` is"
    assert made["first_sentence"]("One line") == "One line"
