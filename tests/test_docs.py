"""The documentation is true: its code runs as written, its links lead somewhere, and it has every public name."""

import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from urllib.parse import unquote

import pytest

import pege_fx
from pege_fx.engines import engine
from pege_fx.export import writer
from pege_fx.numerics.spec import ESTIMATORS, METHODS
from pege_fx.policy import engine_policies

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
PAGES = {str(page.relative_to(ROOT)): page for page in [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]}
ON_THEIR_OWN = ("README.md", "docs/tutorial.md", "docs/howto.md")  # the other pages take what howto.md defines for granted


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for what pages write, registries for what they register, and the environment that torchrun gives one process."""
    monkeypatch.chdir(tmp_path)
    for registry in (METHODS, ESTIMATORS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(writer, "TABLE", dict(writer.TABLE))
    monkeypatch.setattr(engine, "_ENGINES", dict(engine._ENGINES))
    monkeypatch.setattr(engine_policies, "_POLICIES", dict(engine_policies._POLICIES))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setitem(os.environ, name, str(value))


MARKS = {
    "docs/tracing.md": pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning"),  # shows what pege_fx warns of
    "docs/inspection.md": pytest.mark.skipif(shutil.which("dot") is None, reason="draws, which needs Graphviz"),
}
CODE = [
    pytest.param(name, marks=[MARKS[name]] if name in MARKS else [])
    for name, page in PAGES.items()
    if "```python" in page.read_text() and name != "docs/testing.md"  # tests/testing/test_tutorial.py has that, with its output
]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", CODE)
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


def test_the_map_of_layers_is_that_of_the_code() -> None:
    rows = [line for line in PAGES["CONTRIBUTING.md"].read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    named = [name.rstrip("/") for row in rows for name in re.findall(r"`([\w/]+(?:\.py|/))`", row.split("|")[2])]
    there = {path.name for path in (ROOT / "pege_fx").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(named) == sorted(there)


FAKE_QUANTIZE = "torch.fake_quantize_per_tensor_affine"


def rows_of_results() -> Iterator[str]:
    """Rows of the README's tables, from the files that they come from."""
    runs = json.loads((RESULTS / "quickstart.json").read_text())["seeds"]
    for title, key in (("float", "float"), ("W2A2 STE", "ste"), ("W2A2 EWGS", "ewgs"), ("W2A2 PEGE", "pege")):
        values = [100 * run[key]["accuracy"] for run in runs]
        yield f"| {title} | {mean(values):.2f} ± {stdev(values):.2f} |"
    results = json.loads((RESULTS / "cpu.json").read_text())
    usual, kept = (
        {(row["pass"], row["what"]): row["over copy"] for row in results[part]}
        for part in ("kernel, 2 M elements", "memory kept, kernels")
    )
    for what, name in (("pege_fx p=0.5",) * 2, ("pege_fx p=1",) * 2, ("torch fake_quantize", FAKE_QUANTIZE)):
        figures = [f"{usual[part, what]:.1f} / {kept[part, what]:.1f}" for part in ("forward", "backward")]
        yield f"| {name} | {' | '.join(figures)} |"
    for model, shape, bits in (("ResNet-20", "128x3x32x32", "W2A2"), ("resnet18", "32x3x64x64", "W4A4")):
        eager, eager_kept, compiled, compiled_kept = (
            {row["what"]: row for row in results[f"{part}, {model} at {shape}"]}
            for part in ("eager step", "memory kept, eager", "compiled step", "memory kept, compiled")
        )
        for what in (f"{bits} p=0.5", f"{bits} p=1"):
            again = f"{what} recompute"
            pairs = [(eager[what], eager_kept[what]), (eager[again], eager_kept[again]), (compiled[what], compiled_kept[what])]
            figures = [" / ".join(f"{row['over float']:.2f}" for row in pair) for pair in pairs]
            figures += [f"{eager[name]['saved over float']:.2f}" for name in (what, again)]
            yield f"| {model} {shape}, {what} | {' | '.join(figures)} |"


def test_figures_are_those_of_the_result_files() -> None:
    lines = PAGES["README.md"].read_text().splitlines()
    assert [row for row in rows_of_results() if row not in lines] == []


def rows_about_tests() -> Iterator[str]:
    """Rows of docs/mutants.md: the samples of mutants, and the long runs."""
    for name, result in json.loads((RESULTS / "mutants.json").read_text()).items():
        first, killed = (f"{n} ({n / result['tried']:.0%})" for n in (result["killed at first"], result["killed"]))
        yield f"| `{name.replace('.', '/')}.py` | {result['mutants']} | {result['tried']} | {first} | {killed} |"
    runs = json.loads((RESULTS / "long_run.json").read_text())
    for name in ("alone", "with telemetry and guard"):
        for part in (runs[name][0], runs[name][-1]):
            size = part["size"]
            memory, milliseconds = f"{size['resident'] / 2**20:.1f} MiB", f"{1e3 * part['seconds']:.1f} ms"
            yield f"| {name} | {part['steps']:,} | {milliseconds} | {memory} | {size['objects']:,} | {size['tensors']} |"


def test_the_page_about_tests_has_the_stored_figures() -> None:
    lines = PAGES["docs/mutants.md"].read_text().splitlines()
    assert [row for row in rows_about_tests() if row not in lines] == []


def rows_next_to_others() -> Iterator[str]:
    """Rows of the page on benchmarks."""
    results = json.loads((RESULTS / "cpu.json").read_text())
    networks = [{row["what"]: row for row in rows} for title, rows in results.items() if title.startswith("libraries")]
    for what in networks[0]:
        figures = [row[what][key] for row in networks for key in ("over float", "saved over float")]
        yield f"| {what} | {' | '.join(f'{figure:.2f}' for figure in figures)} |"
    for row in results["evaluation, resnet18"]:
        yield f"| {row['input']} | {row['over float']:.2f} |"
    for row in results["prepare"]:
        yield f"| {row['model']} | {row['over trace']:.1f} | {row['shared over trace']:.1f} |"
    for part, where in (("eager step", ""), ("memory kept, eager", ", memory kept")):
        for row in results[f"{part}, ResNet-20 at 128x3x32x32"]:
            if "recompute" not in row["what"]:
                figures = f"{row['user ms']:.0f} | {row['system ms']:.0f} | {round(row['page faults'], -2):,.0f}"
                yield f"| {row['what']}{where} | {figures} |"


def rows_of_a_gpu() -> Iterator[str]:
    results = json.loads((RESULTS / "gpu.json").read_text())
    steps = {(row["model"], row["how"]): row for row in results["step"]}
    for model in dict.fromkeys(model for model, _ in steps if model != "float"):
        found = [steps.get((model, how)) for how in ("graph", "compiled", "eager")]
        times = [f"{row['over_float']:.2f}" if row else "-" for row in found]
        yield f"| {model} | {' | '.join(times)} | {steps[model, 'eager']['peak_over_float']:.2f} |"
    kernels = {(row["kernel"], row["dtype"], row["p"]): row["over_copy"] for row in results["kernel"]}
    for name in dict.fromkeys(name for name, *_ in kernels):
        figures = [kernels[name, dtype, p] for dtype in ("float32", "bfloat16") for p in (0.5, 1.0)]
        yield f"| {name} | {' | '.join(f'{figure:.2f}' for figure in figures)} |"


def test_figures_next_to_others_and_of_a_gpu_are_those_of_the_result_files() -> None:
    lines = PAGES["docs/benchmarks.md"].read_text().splitlines()
    assert [row for row in (*rows_next_to_others(), *rows_of_a_gpu()) if row not in lines] == []


def test_what_pages_say_of_exports_is_in_the_file_that_they_name() -> None:
    models = json.loads((RESULTS / "exports.json").read_text()).values()
    verified = sum(model.get("verdict") in ("exact", "ties") for model in models)
    codes, differing = (sum(model.get(key, 0) for model in models) for key in ("codes", "differing"))
    furthest = max(model.get("excess", 0) for model in models)
    readme = " ".join(PAGES["README.md"].read_text().split())
    assert f"{verified} of torchvision's {len(models)} classifiers and segmenters are verified in W4A4" in readme
    assert (
        f"of {codes / 1e6:,.0f} million codes {differing} differ, none more than {furthest:.1e} steps from a border" in readme
    )
    assert f"verdicts on {len(models)} models" in PAGES["docs/benchmarks.md"].read_text()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs both make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")])
def test_a_page_is_in_the_menu_of_the_site(name: str) -> None:
    assert f" {name}\n" in (ROOT / "mkdocs.yml").read_text(), f"add {name} to nav in mkdocs.yml"


def prose(name: str) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", PAGES[name].read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("name", PAGES)
def test_the_site_finds_what_a_page_shows_and_links_to(name: str) -> None:
    """mkdocs gives each page a folder and rewrites what Markdown links to, files alone; HTML on a page stays as it is."""
    assert re.findall(r"""<[^>]+\b(?:src|href)=["'](?![a-z]+:|#)[^"']*""", prose(name)) == []
    for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", prose(name)):
        assert (PAGES[name].parent / target).resolve().is_file(), f"{target} is no file"


class Targets(HTMLParser):
    """What a page of the site asks for: images, links, scripts and style sheets."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


def test_every_image_and_link_of_the_built_site_leads_somewhere(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    missing = {
        f"{page.relative_to(tmp_path)}: {target}"
        for page in tmp_path.rglob("*.html")
        for target in Targets(page).found
        if not re.match(r"[a-z]+:|//|#", target) and not there(page, target, tmp_path)
    }
    assert missing == set()


def there(page: Path, target: str, site: Path) -> bool:
    """Whether a server would find a file: a folder is its index.html, and a leading slash is the top of the site."""
    path = unquote(re.split(r"[?#]", target)[0])
    found = site / path.lstrip("/") if path.startswith("/") else page.parent / path
    return found.is_file() or (found / "index.html").is_file()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose(name)):
        path, _, anchor = target.partition("#")
        found = PAGES[name] if not path else (PAGES[name].parent / path).resolve()
        assert found.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"


NAMES = [name for name in pege_fx.__all__ if not inspect.ismodule(getattr(pege_fx, name))]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(pege_fx, name))]
ERRORS = [name for name in NAMES if inspect.isclass(cls := getattr(pege_fx, name)) and issubclass(cls, Exception)]
# What functions return. Nobody makes one, so that an example is the function's.
RESULTS_OF = {
    "CheckpointInfo": "checkpoint_info", "Coverage": "summary", "Diff": "diff", "Explanation": "explain", "Finding": "Guard",
    "IntegerCoverage": "integer_coverage", "Sensitivity": "sensitivity", "SizeReport": "size_report", "Summary": "summary",
    "Statistics": "ForwardMethod",
}  # fmt: skip
WITHOUT_ERRORS = {"fake_quants", "convert_passes"}


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name: str) -> None:
    """A summary in one line and an example for everything, and a docstring for each public member."""
    documented = getattr(pege_fx, name)
    text = documented.__doc__ or ""
    assert text.strip().split("\n")[0].rstrip().endswith((".", ":")), "a summary in one line"
    if name not in ERRORS:
        assert ">>> " in getattr(pege_fx, RESULTS_OF.get(name, name)).__doc__
    if inspect.isclass(documented):
        for member in (member for member in vars(documented) if not member.startswith("_")):
            if callable(value := getattr(documented, member)) or isinstance(value, property):
                assert inspect.getdoc(value), member


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ERRORS and name not in RESULTS_OF])
def test_each_argument_is_documented(name: str) -> None:
    documented = getattr(pege_fx, name)
    for parameter in inspect.signature(documented).parameters:
        assert re.search(rf"\b{parameter}\b", documented.__doc__), parameter


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_and_raise(name: str) -> None:
    text = getattr(pege_fx, name).__doc__
    assert "Args:" in text
    assert ("Raises:" in text) != (name in WITHOUT_ERRORS)


def test_the_reference_has_every_public_name_once() -> None:
    expected = {*pege_fx.__all__, "testing"}
    found = re.findall(
        r"^::: pege_fx\.(?!integrations)(\S+)$", "\n".join(map(Path.read_text, (DOCS / "api").glob("*.md"))), re.M
    )
    assert sorted(found) == sorted(expected - {"curves"})  # each curve has an entry of its own
