"""One definition of relative error and of clipped: Telemetry, Guard and the report's page give the same figure."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import Guard, QuantPolicy, Telemetry
from pege_fx.modules.measures import clipped_share

X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def prepared(method: str) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    net[1].weight.data.uniform_(-2, 2)
    net[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    net[1].eval()
    return pege_fx.prepare(net, QuantPolicy.parse("W2A2", first="2", last="2", method=method), (X,))


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa", "interval", "minmax"])
def test_telemetry_guard_and_report_agree(method: str, tmp_path: Path) -> None:
    gm = prepared(method)
    telemetry = Telemetry(gm, every=1)
    gm(X).sum().backward()  # p = 1: what evaluation computes
    telemetry.step()
    telemetry.close()
    rows = {row["site"]: row for row in telemetry.history}
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            inputs.setdefault(name, args[0].detach())

        return hook

    hooks = [fq.register_forward_hook(keep(name)) for name, fq in pege_fx.fake_quants(gm).items()]
    pege_fx.report(gm, tmp_path / "r.html", batches=[X])
    for hook in hooks:
        hook.remove()
    html = (tmp_path / "r.html").read_text()
    data, _ = json.JSONDecoder().raw_decode(html[html.index('{"title"') :])
    page = {site["site"]: site for site in data["sites"]}
    shares = {name: clipped_share(fq, inputs[name]) for name, fq in pege_fx.fake_quants(gm).items()}
    findings = {finding.site: finding.value for finding in Guard(gm, clipped=-1.0).findings(X) if finding.kind == "clipped"}
    for name, row in rows.items():
        if method != "minmax" or name.endswith("weight_fq"):  # a step of training moves what min-max has observed
            assert page[name]["error"] == pytest.approx(row["error"], rel=2e-2, abs=1e-6), name
            assert shares[name] == pytest.approx(row["clipped"], abs=2e-2), name
        assert findings[name] == pytest.approx(shares[name], abs=1e-6)


def test_a_clipped_value_lies_more_than_half_a_step_beyond_the_end() -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4", torch.randn(2, 4))
    fq = pege_fx.fake_quants(gm)["_1_fq"]
    assert isinstance(fq.method.scale, nn.Parameter)
    fq.method.scale.data.fill_(1.0)
    q_min, q_max = fq.site.spec.bounds
    assert clipped_share(fq, torch.tensor([q_min - 0.4, 0.0, q_max + 0.4, q_max + 0.6, q_min - 0.6])) == pytest.approx(0.4)


def test_what_dorefa_bends_is_not_clipped() -> None:
    gm = prepared("dorefa")
    for name, fq in pege_fx.fake_quants(gm).items():
        if name.endswith("weight_fq"):
            assert clipped_share(fq, gm.get_parameter(name.removesuffix("_fq")).detach()) == 0.0
