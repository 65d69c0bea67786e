"""The page: whole, offline, and working in headless Chromium where that is installed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import pege_fx
from pege_fx.errors import ExportError, InputError


@pytest.fixture
def gm() -> GraphModule:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return pege_fx.prepare(nn.Sequential(block, nn.ReLU(), nn.Conv2d(4, 4, 3)), "W4A4", (torch.randn(1, 3, 9, 9),))


def test_bad_input_is_refused(gm: GraphModule, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="can not write"):
        pege_fx.report(gm, tmp_path / "missing" / "report.html")
    with pytest.raises(InputError, match="history"):
        pege_fx.report(gm, tmp_path / "report.html", history=[{"step": 1}])


FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    with sync.sync_playwright() as play:
        started = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(gm: GraphModule, browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page about a model in training; no errors on its console."""
    rows = [{"step": step, "site": "0.0.weight_fq", "error": 1 / (step + 1), "p": 0.5} for step in range(5)]
    scheduler = pege_fx.PEGEScheduler(gm, 10)
    scheduler.step()
    pege_fx.report(gm, tmp_path / "a.html", batches=[torch.randn(1, 3, 9, 9)], scheduler=scheduler, history=rows)
    opened = browser.new_page()
    said: list[str] = []
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("console", lambda message: said.append(message.text))
    opened.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    opened.goto((tmp_path / "a.html").as_uri())
    yield opened
    opened.close()
    assert said == []


def test_search_and_click_show_the_bits(page: Any) -> None:
    assert "parameters:" in page.inner_text("#details")
    page.fill("#search", "0.2")
    page.press("#search", "Enter")
    assert page.inner_text("#found") == "1 of 1"
    found = page.inner_text("#details")
    assert "4 bits, signed" in found
    assert "rule 0" in found
    assert page.locator("#details svg").count() == 2  # histograms of its weight and its input
    page.fill("#search", "nowhere")
    page.press("#search", "Enter")
    assert page.inner_text("#found") == "nothing found"
    at = page.evaluate("(() => { const at = cy.getElementById('_2').renderedPosition(); return [at.x, at.y]; })()")
    box = page.locator("#graph").bounding_box()
    page.mouse.click(box["x"] + at[0], box["y"] + at[1])
    assert page.inner_text("#details h2") == "2 conv2d W8"
    assert "8 bits, signed" in page.inner_text("#details")


def test_everything_can_be_done_with_the_keyboard(page: Any) -> None:
    page.focus("#graph")
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    assert page.inner_text("#details h2") == "0 conv2d W8"
    page.keyboard.press("Backspace")  # its module, and no other
    assert page.evaluate("cy.$(':selected').id()") == "module 0"
    shut = page.evaluate("cy.nodes().length")
    assert "0.2" in page.inner_text("#details")
    page.keyboard.press("Enter")
    assert page.evaluate("cy.nodes().length") > shut
    page.keyboard.press("ArrowRight")
    before = page.evaluate("cy.zoom()")
    page.keyboard.press("+")
    assert page.evaluate("cy.zoom()") > before
    page.locator("#sites th button").nth(2).focus()
    page.keyboard.press("Enter")
    assert page.locator("#sites td.bits").first.inner_text() == "4"
    page.keyboard.press("Enter")
    assert page.locator("#sites td.bits").first.inner_text() == "8"
    page.locator("#heat button").last.focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#details h2") == "2 conv2d W8"


def test_tables_and_curves_are_there(page: Any) -> None:
    page.click("#collapse")
    assert page.evaluate("cy.nodes().length") == 5
    page.click("#expand")
    assert page.evaluate("cy.nodes(':childless').length") == 6
    assert page.locator("#heat button").count() == 6
    assert page.locator(".uplot").count() == 5  # three of the schedule, error and p of the run
    assert page.inner_text("#schedule p").startswith("Step 1 of 10. p = ")


def test_light_and_dark(page: Any) -> None:
    for scheme, paper, ink in (
        ("light", "rgb(255, 255, 255)", "rgb(26,26,26)"),
        ("dark", "rgb(23, 25, 28)", "rgb(238,238,238)"),
    ):
        page.emulate_media(color_scheme=scheme)  # the page follows when it gets to it: each wait fails after 30 s
        page.wait_for_function("paper => getComputedStyle(document.body).backgroundColor === paper", arg=paper)
        page.wait_for_function("ink => cy.edges().first().style('color') === ink", arg=ink)


def written(gm: GraphModule, path: Path, **options: Any) -> dict[str, Any]:
    """The data in the page."""
    pege_fx.report(gm, path, **options)
    text = path.read_text()
    found = json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert isinstance(found, dict)
    return found


def test_history_from_the_file_that_telemetry_writes(gm: GraphModule, tmp_path: Path) -> None:
    telemetry = pege_fx.Telemetry(gm, every=1, writers=[pege_fx.CSVWriter(tmp_path / "run.csv")])
    gm.train()(torch.randn(2, 3, 9, 9)).sum().backward()
    telemetry.step()
    telemetry.close()
    from_file = written(gm, tmp_path / "a.html", history=tmp_path / "run.csv")["history"]
    assert from_file
    assert {"step", "site", "error", "clipped", "scale", "p"} <= set(from_file[0])
    assert from_file == written(gm, tmp_path / "b.html", history=telemetry.history)["history"]


class Branching(nn.Module):
    """Can not be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


def test_what_stays_python_is_on_the_page(tmp_path: Path) -> None:
    with pytest.warns(pege_fx.PegeWarning, match="stays Python"):
        gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), Branching()), "W4A4", (torch.randn(2, 4),))
    (capture,) = (one for one in written(gm, tmp_path / "a.html")["captures"] if one["rung"] == "python")
    assert capture["path"] == "1"
    assert "test_report.py" in capture["place"]
    facts = pege_fx.to_networkx(gm).nodes["_1"]
    assert facts["reason"].startswith("stays Python: ")
    assert "test_report.py" in facts["place"]
