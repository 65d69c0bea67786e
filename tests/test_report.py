"""The page: whole, offline, and working in headless Chromium where that is installed."""

import shutil
from pathlib import Path

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
    rows = [{"step": step, "site": "0.0.weight_fq", "error": 1 / (step + 1)} for step in range(5)]
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
        plots = page.locator(".uplot").count()
        browser.close()
    assert errors == []
    assert "4 bits, signed" in found
    assert moved != found
    assert "8 bits, signed" in clicked
    assert plots == 4
