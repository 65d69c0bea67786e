"""The parts of docs/architecture.md and CONTRIBUTING.md that the code says: layers, passes, and a drawing of both.

python docs/theme/architecture.py     writes them; tests/test_architecture.py fails where they are old
"""

import ast
import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pege_fx import api
from pege_fx.passes.pipeline import Pass

ROOT = Path(__file__).parents[2]
SVG = "docs/images/architecture.svg"
MARK = "<!-- made from the code: {} -->"


def floors() -> list[list[str]]:
    """The layers from the ground up, as the test of the layers holds them against the imports."""
    for node in ast.parse((ROOT / "tests" / "test_layers.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FLOORS" and node.value is not None:
            return [sorted(name for name in names if "." not in name) for names in ast.literal_eval(node.value)]
    raise LookupError("tests/test_layers.py has no FLOORS")


def file_of(name: str) -> Path:
    """The file of a layer, or the ``__init__.py`` of its folder."""
    if name in ("", "passes"):
        return ROOT / (name or "pege_fx") / "__init__.py"
    path = ROOT / "pege_fx" / name
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def summary_of(name: str) -> str:
    """The first sentence of a layer's docstring."""
    return first_sentence(ast.get_docstring(ast.parse(file_of(name).read_text())) or "")


def first_sentence(docstring: str) -> str:
    text = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)\"`])\. |: python ", text)[0].rstrip(".").replace("``", "`").replace("|", "\\|")


def shown(name: str) -> str:
    """A layer as the pages name it."""
    if not name:
        return "`__init__.py`"
    at_top = " (at the top of the repository)" if name == "passes" else ""
    return (f"`{name}/`" if file_of(name).name == "__init__.py" else f"`{name}.py`") + at_top


def layers() -> Iterator[str]:
    """The table of layers, the top floor first."""
    yield "| floor | in `pege_fx/` | what it holds |"
    yield "|---|---|---|"
    for number, names in reversed(list(enumerate(floors()))):
        yield f"| {number} | {', '.join(map(shown, names))} | {'. '.join(map(summary_of, names))} |"


def passes(steps: list[Pass]) -> Iterator[str]:
    """A table of passes in their order: name, file, what it does."""
    yield "| pass | file in `passes/` | what it does |"
    yield "|---|---|---|"
    for step in steps:
        what: Any = step if inspect.isfunction(step) else type(step)
        path = what.__module__.removeprefix("pege_fx.passes.").replace(".", "/") + ".py"
        yield f"| `{what.__name__}` | `{path}` | {first_sentence(what.__doc__ or '')} |"


def drawing() -> str:
    """Both as one picture: how a model goes through the passes, and on which layers the code lies."""
    flow = ["model", "prepare", "train", "convert", "deploy"]
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" font-family="sans-serif" font-size="13">',
        "<style>rect{fill:#eef1fb;stroke:#3f51b5}text{fill:#1a237e}path{stroke:#3f51b5;fill:none;marker-end:url(#a)}</style>",
        '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill:#3f51b5;stroke:none;marker-end:none"/></marker>',
    ]
    for number, word in enumerate(flow):
        x = 10 + number * 172
        lines += [box(x, 10, 140, word)]
        lines += [f'<path d="M{x + 140} 25H{x + 170}"/>'] if number < len(flow) - 1 else []
    columns = [api.steps_of_prepare(api.prepare_passes("W4A4")), list(api.convert_passes())]
    lowest = 0
    for x, steps in zip((182, 526), columns, strict=True):
        for number, step in enumerate(steps):
            name = getattr(step, "__name__", type(step).__name__)
            y = 70 + 42 * number
            lines += [f'<path d="M{x + 70} {y - 30 if number == 0 else y - 12}V{y - 2}"/>', box(x - 10, y, 160, name)]
            lowest = max(lowest, y + 30)
    top = lowest + 40
    lines += [f'<text x="10" y="{top - 10}">Layers: imports point downward only</text>']
    for number, names in enumerate(reversed(floors())):
        label = ", ".join((name or "__init__") for name in names)
        lines += [box(10, top + 34 * number, 828, label)]
    return "\n".join([*lines, "</svg>", ""]).replace("{height}", str(top + 34 * len(floors()) + 10))


def box(x: int, y: int, width: int, label: str) -> str:
    text = f'<text x="{x + width // 2}" y="{y + 20}" text-anchor="middle">{html.escape(label)}</text>'
    return f'<rect x="{x}" y="{y}" width="{width}" height="30" rx="5"/>{text}'


def parts() -> dict[str, dict[str, list[str]]]:
    """What belongs between the marks of each page."""
    prepared = api.steps_of_prepare(api.prepare_passes("W4A4"))
    converted = list(api.convert_passes(integer_bias=True, packed=True))
    return {
        "docs/architecture.md": {"prepare": list(passes(prepared)), "convert": list(passes(converted))},
        "CONTRIBUTING.md": {"layers": list(layers())},
    }


def pages() -> dict[str, str]:
    """Every file that is made from the code, as it has to be."""
    made = {SVG: drawing()}
    for path, found in parts().items():
        text = (ROOT / path).read_text()
        for name, lines in found.items():
            start, end = MARK.format(name), MARK.format(f"end of {name}")
            before, _, rest = text.partition(start)
            _, _, after = rest.partition(end)
            text = "\n".join([before + start, "", *lines, "", end]) + after
        made[path] = text
    return made


if __name__ == "__main__":
    for name, text in pages().items():
        (ROOT / name).write_text(text)
