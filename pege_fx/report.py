"""One page about a prepared model that opens offline: its graph, sites, histograms, schedule and training."""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule

from pege_fx.dataflow import compact, to_networkx
from pege_fx.draw import COLOURS, edge_label
from pege_fx.errors import ExportError, InputError
from pege_fx.fake_quant import FakeQuant, fake_quants
from pege_fx.scheduler import PEGEScheduler, plan_of

BINS = 48
SAMPLE = 1 << 16
"""Elements of a tensor that a histogram and its error are taken from, evenly spaced."""
FIGURES = ("error", "clipped", "scale", "p", "weight_lambda", "activation_lambda")
NODE_FIELDS = ("name", "path", "module", "function", "weight_bits", "shape", "dtype", "code", "reason", "batch_norm")


def report(
    gm: GraphModule,
    path: str | Path,
    *,
    batches: Iterable[Any] | None = None,
    scheduler: PEGEScheduler | None = None,
    history: Iterable[Mapping[str, Any]] | str | Path | None = None,
) -> None:
    """Write one HTML page, which needs no network, about a prepared model.

    Args:
        gm: from ``prepare``.
        path: of the page.
        batches: inputs (a tensor, or a tuple of arguments) to measure histograms and errors on, in evaluation.
        scheduler: its curves and where it stands are drawn.
        history: ``Telemetry.history``, or the path of the CSV file that it wrote: rows with "step", "site" and any of
            "error", "clipped", "scale", "p", "weight_lambda", "activation_lambda".

    Raises:
        ModelError: if ``gm`` was not prepared.
        InputError: if the history can not be read.
        ExportError: if the page can not be written.
    """
    captures = [vars(capture) for capture in plan_of(gm).captures if capture.reason]
    rows = _history(history)
    data = _data(to_networkx(gm), _measured(gm, batches))
    page = _page(data | {"captures": captures, "schedule": _schedule(scheduler), "history": rows})
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ExportError(f"can not write {path}: {error.strerror or error}; choose another path.") from error


def _data(graph: nx.DiGraph, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    sites = [
        {field: facts[field] for field in ("kind", "bits", "signed", "method", "estimator", "rule", "scale")}
        | {"site": facts["path"], **measured.get(facts["target"], {}), **measured.get(facts["path"], {})}
        for facts in graph.nodes.values()
        if facts["bits"] is not None
    ]
    small = compact(graph)
    reads = {key: [graph.nodes[s]["path"] for s in graph.predecessors(key) if graph.nodes[s]["bits"]] for key in small}
    nodes = [
        {"id": key, "sites": reads[key]} | {field: facts.get(field) for field in NODE_FIELDS}
        for key, facts in small.nodes.items()
    ]
    edges = [(source, target, edge_label(facts)) for source, target, facts in small.edges(data=True)]
    title = f"{graph.graph['model']}, quantized"
    return {"title": title, "nodes": nodes, "edges": edges, "sites": sites, "colours": COLOURS}


def _measured(gm: GraphModule, batches: Iterable[Any] | None) -> dict[str, dict[str, Any]]:
    """Histogram and relative error of each site on the first batch that reaches it, as evaluation computes it."""
    found: dict[str, dict[str, Any]] = {}
    modes = {module: module.training for module in gm.modules()}

    def watch(name: str) -> Any:
        def hook(fq: FakeQuant, args: tuple[Tensor, ...], result: Tensor) -> None:
            if name not in found and fq.is_calibrated:
                found[name] = _histogram(fq, args[0].detach(), result.detach())

        return hook

    sites = fake_quants(gm)
    hooks = [fq.register_forward_hook(watch(name)) for name, fq in sites.items()]
    try:
        gm.eval()
        with torch.no_grad():
            for batch in batches or ():
                gm(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
                if len(found) == len(sites):
                    break
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return found


def _histogram(fq: FakeQuant, x: Tensor, y: Tensor) -> dict[str, Any]:
    if fq.fold is not None:
        x = x * fq.fold.broadcast(fq.fold.factor(), x).to(x.dtype)
    stride = max(1, x.numel() // SAMPLE) | 1
    x, y = (value.flatten()[::stride].float().cpu() for value in (x, y))
    low, high = min(float(x.min()), float(y.min())), max(float(x.max()), float(y.max()))
    error = float((x - y).norm() / x.norm().clamp_min(1e-12))
    if not all(map(math.isfinite, (low, high, error))):
        return {}
    counts = {name: torch.histc(v, BINS, low, high).int().tolist() for name, v in (("continuous", x), ("quantized", y))}
    return {"low": low, "high": high, "error": error, **counts}


def _schedule(scheduler: PEGEScheduler | None) -> dict[str, Any] | None:
    if scheduler is None:
        return None
    steps = sorted({round(i * scheduler.total_steps / 200) for i in range(201)})
    groups = {"default": scheduler, **scheduler.groups}
    curves = {
        name: {group: [(getattr(own, name) or getattr(scheduler, name))(t) for t in steps] for group, own in groups.items()}
        for name in ("replacement", "weight_lambda", "activation_lambda")
    }
    return {"t": steps, "curves": curves, "now": scheduler.t}


def _history(history: Iterable[Mapping[str, Any]] | str | Path | None) -> list[dict[str, Any]]:
    try:
        if isinstance(history, (str, Path)):
            with open(history, newline="", encoding="utf-8") as file:
                history = list(csv.DictReader(file))
        return [_row(row) for row in history or ()]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the history can not be read ({error}): give rows, or a CSV file, with step, site and {', '.join(FIGURES)}."
        ) from error


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    figures = {name: float(row[name]) for name in FIGURES if row.get(name) not in (None, "")}
    known = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    if not figures:
        raise ValueError(f"step {row['step']} has none of the figures")
    return {"step": float(row["step"]), "site": str(row["site"]), **known}


def _page(data: dict[str, Any]) -> str:
    static = files("pege_fx") / "static"
    read = {name: (static / name).read_text("utf-8") for name in ("report.html", "report.js", "uPlot.min.css")}
    libraries = [(static / n).read_text("utf-8") for n in ("cytoscape.min.js", "cytoscape-dagre.min.js", "uPlot.iife.min.js")]
    title = data["title"].replace("&", "&amp;").replace("<", "&lt;")
    parts = {
        "title": title, "styles": read["uPlot.min.css"], "data": json.dumps(data).replace("<", "\\u003c"),
        "libraries": "\n;".join(libraries), "script": read["report.js"],
    }  # fmt: skip
    page = read["report.html"]
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    return page
