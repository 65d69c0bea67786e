"""The documentation is true: its code runs as written, its links lead somewhere, and it has every public name."""

import os
import re
import socket
from pathlib import Path

import pytest

import pege_fx
from pege_fx.export import writer
from pege_fx.spec import ESTIMATORS, METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(ROOT)): page for page in [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]}
ON_THEIR_OWN = ("README.md", "docs/tutorial.md", "docs/howto.md")  # the other pages take what howto.md defines for granted


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for what pages write, registries for what they register, and the environment that torchrun gives one process."""
    monkeypatch.chdir(tmp_path)
    for registry in (METHODS, ESTIMATORS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(writer, "TABLE", dict(writer.TABLE))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setitem(os.environ, name, str(value))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if "```python" in page.read_text()])
def test_the_code_of_a_page_runs_as_written(name: str) -> None:
    sybil = pytest.importorskip("sybil")
    markdown = pytest.importorskip("sybil.parsers.markdown")
    for package in ("matplotlib", "onnx", "onnxruntime", "sklearn", "torchvision"):
        pytest.importorskip(package)
    blocks = sybil.Sybil(parsers=[markdown.PythonCodeBlockParser(), markdown.SkipParser()], patterns=["*.md"])
    namespace = {"__name__": "page"}
    with pege_fx.kernels.eager_kernels():
        for page in [PAGES[name]] if name in ON_THEIR_OWN else [DOCS / "howto.md", PAGES[name]]:
            document = blocks.parse(page)
            document.namespace.update(namespace)
            for block in document.examples():
                block.evaluate()
            namespace = document.namespace


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs both make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", PAGES[name].read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        found = PAGES[name] if not path else (PAGES[name].parent / path).resolve()
        assert found.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"
