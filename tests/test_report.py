"""The page: whole, offline, and working in headless Chromium where that is installed."""

import json
import shutil
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


def test_in_a_browser(gm: GraphModule, tmp_path: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium")
    scheduler = pege_fx.PEGEScheduler(gm, 10)
    rows = [{"step": step, "site": "0.0.weight_fq", "error": 1 / (step + 1), "p": 0.5} for step in range(5)]
    page_path = tmp_path / "report.html"
    pege_fx.report(gm, page_path, batches=[torch.randn(1, 3, 9, 9)], scheduler=scheduler, history=rows)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(page_path.as_uri())
        page.fill("#search", "0.2")
        page.press("#search", "Enter")
        found = page.inner_text("#details")
        page.focus("#graph")
        page.keyboard.press("ArrowDown")
        moved = page.inner_text("#details")
        page.evaluate("cy.getElementById('_2').emit('tap')")
        clicked = page.inner_text("#details")
        page.focus("#graph")
        page.keyboard.press("Backspace")
        page.evaluate("cy.getElementById('module 0').select()")
        page.keyboard.press("Enter")
        opened = page.evaluate("cy.nodes().length")
        page.click("#collapse")
        shut = page.evaluate("cy.nodes().length")
        page.locator("#sites th button").nth(2).focus()
        page.keyboard.press("Enter")
        first = page.locator("#sites td.bits").first.inner_text()
        cells = page.locator("#heat button").count()
        plots = page.locator(".uplot").count()
        browser.close()
    assert errors == []
    assert "4 bits, signed" in found
    assert moved != found
    assert "8 bits, signed" in clicked
    assert plots == 5
    assert opened > shut
    assert first == "4"
    assert cells == 6


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
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), Branching()), "W4A4", (torch.randn(2, 4),))
    (capture,) = (one for one in written(gm, tmp_path / "a.html")["captures"] if one["rung"] == "python")
    assert capture["path"] == "1"
    assert "test_report.py" in capture["place"]
    reasons = [facts["reason"] for facts in pege_fx.to_networkx(gm).nodes.values()]
    assert any("stays Python" in reason and "test_report.py" in reason for reason in reasons)
