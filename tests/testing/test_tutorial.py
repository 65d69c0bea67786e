"""docs/testing.md and docs/extending.md run as written, and say what is printed."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / name).read_text(encoding="utf-8"))


def shape_of(text: str) -> list[str]:
    """The lines of an output, without what depends on the machine (numbers) and on torch's version (its ``repr``)."""
    text = text.replace("affine=True, bias=True", "affine=True")
    return [re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", line) for line in text.splitlines() if "device" not in line]


@pytest.mark.parametrize("name", ["testing.md"])
def test_the_tutorial_runs_and_prints_what_it_says(name: str) -> None:
    space: dict[str, Any] = {"__name__": "tutorial"}
    printed = ""
    for kind, text in blocks(name):
        if kind == "text":
            assert shape_of(printed) == shape_of(text)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, name, "exec"), space)
        printed = out.getvalue()
