"""One page about a prepared model that opens offline: its graph, sites, histograms, schedule and training."""

import csv
import html
import json
import math
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule

from pege_fx._utils.files import atomic_write, path_of, path_to_read
from pege_fx.errors import ExportError, InputError
from pege_fx.inspection.dataflow import to_networkx
from pege_fx.inspection.display_graph import edge_label, rest, shape_label, title, to_display
from pege_fx.inspection.draw import COLOURS, FLOAT, PLAIN, PYTHON, colour_of, ink
from pege_fx.inspection.size import size_report
from pege_fx.inspection.tables import totals
from pege_fx.modules.fake_quant import FakeQuant, fake_quants
from pege_fx.modules.measures import relative_error, squares
from pege_fx.modules.mode import evaluating
from pege_fx.modules.stages import graph_of
from pege_fx.training.batches import as_arguments, call, each_batch
from pege_fx.training.scheduler import PEGEScheduler, plan_of
from pege_fx.training.telemetry import COLUMNS

BINS = 48
SAMPLE = 1 << 16
"""Elements of a tensor that a histogram and its error are taken from, evenly spaced."""
FIGURES = COLUMNS[2:]
CURVES = ("replacement", "weight_lambda", "activation_lambda")


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
        batches: as ``calibrate`` takes them, to measure histograms and errors on, in evaluation.
        scheduler: its curves and where it stands are drawn.
        history: ``Telemetry.history``, or the path of the CSV file that it wrote: rows with "step", "site" and any of
            its figures.

    Raises:
        ModelError: if ``gm`` was not prepared.
        InputError: if the history can not be read, or a batch does not fit ``forward``.
        ExportError: for another ending than .html, or if the page can not be written.

    >>> import tempfile
    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report(gm, f"{folder}/report.html", batches=[torch.randn(8, 4)])
    """
    path = path_of(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ExportError(f"{path.name!r} has the ending {path.suffix!r}: a report ends in .html.")
    gm = graph_of(gm, "prepared")
    plan, rows = plan_of(gm), _history(history)
    page = _page(
        {
            "title": f"{plan.model}, quantized",
            "totals": [*totals(plan, size_report(gm))],
            "captures": [vars(capture) for capture in plan.captures if capture.reason],
            "colours": _colours(),
            "schedule": _schedule(scheduler),
            "history": rows,
            "figures": FIGURES,
            **_graph(to_networkx(gm), _measured(gm, batches)),
        }
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _colours() -> dict[str, dict[str, str]]:
    words = {**{str(bits): f"{bits}-bit weight" for bits in COLOURS}, "float": "left in float", "python": "stays Python"}
    fills = {**{str(bits): colour for bits, colour in COLOURS.items()}, "float": FLOAT, "python": PYTHON, "plain": PLAIN}
    return {name: {"fill": fill, "ink": ink(fill), "words": words.get(name, "")} for name, fill in fills.items()}


def _graph(graph: nx.DiGraph, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    sites = [
        {field: facts[field] for field in ("kind", "bits", "signed", "method", "estimator", "rule", "scale")}
        | {"site": facts["path"], **measured.get(facts["path"], {})}
        for facts in graph.nodes.values()
        if facts["bits"] is not None
    ]
    small = to_display(graph)
    nodes = [_node(graph, key, facts) for key, facts in small.nodes.items()]
    edges = [(source, target, edge_label(facts), facts["kind"] == "graph") for source, target, facts in small.edges(data=True)]
    return {"nodes": nodes, "edges": edges, "sites": sites, "used": sorted({node["paint"] for node in nodes} - {"plain"})}


def _node(graph: nx.DiGraph, key: str, facts: dict[str, Any]) -> dict[str, Any]:
    names = {colour: name for name, colour in (("float", FLOAT), ("python", PYTHON), ("plain", PLAIN))}
    return {
        "id": key,
        "box": facts["box"],
        "title": title(facts),
        "rest": shape_label(facts) if facts["op"] == "placeholder" else rest(facts),
        "bits": facts["weight_bits"],
        "paint": str(facts["weight_bits"][0]) if facts["weight_bits"] else names[colour_of(facts)],
        "operations": sum(member["quantized"] is not None for member in facts["members"]),
        "members": [_member(graph, member) for member in facts["members"]],
    }


def _member(graph: nx.DiGraph, facts: dict[str, Any]) -> dict[str, Any]:
    def sites(keys: Iterable[str]) -> list[str]:
        return [graph.nodes[key]["path"] for key in keys if graph.nodes[key]["bits"] is not None]

    kept = {
        field: facts.get(field) for field in ("path", "function", "code", "reason", "place", "line", "batch_norm", "quantized")
    }
    shape = " ".join(filter(None, (shape_label(facts), facts["dtype"])))
    key = facts["key"]
    return {
        "id": key,
        "shape": shape,
        "sites": sites(graph.predecessors(key)),
        "quantizes": sites(graph.successors(key)),
        **kept,
    }


def _measured(gm: GraphModule, batches: Iterable[Any] | None) -> dict[str, dict[str, Any]]:
    """Histogram and relative error of each site on the first batch that reaches it, as evaluation computes it."""
    found: dict[str, dict[str, Any]] = {}

    def watch(name: str) -> Any:
        def hook(fq: FakeQuant, args: tuple[Tensor, ...], result: Tensor) -> None:
            if name in found or not fq.is_calibrated:
                return
            x, y = args[0].detach(), result.detach()
            if others := args[2:]:  # inputs on the same scale
                x = torch.cat([value.flatten() for value in (x, *others)])
                y = fq.deployed(x)
            found[name] = _histogram(fq, x, y)

        return hook

    sites = fake_quants(gm)
    hooks = [fq.register_forward_hook(watch(name)) for name, fq in sites.items()]
    try:
        with evaluating(gm):
            for batch in () if batches is None else each_batch(batches, "report"):
                call(gm, *as_arguments(gm, batch))
                if len(found) == len(sites):
                    break
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _histogram(fq: FakeQuant, x: Tensor, y: Tensor) -> dict[str, Any]:
    error = float(relative_error(squares(fq, fq.enter(x))))
    if fq.fold is not None:
        x = x * fq.fold.broadcast(fq.fold.factor(), x).to(x.dtype)
    stride = max(1, x.numel() // SAMPLE) | 1
    x, y = (value.flatten()[::stride].float().cpu() for value in (x, y))
    low, high = min(float(x.min()), float(y.min())), max(float(x.max()), float(y.max()))
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
        name: {group: [_curve(scheduler, own, name)(t) for t in steps] for group, own in groups.items()} for name in CURVES
    }
    now = {group: {name: _curve(scheduler, own, name)(scheduler.t) for name in CURVES} for group, own in groups.items()}
    return {"t": steps, "total": scheduler.total_steps, "now": scheduler.t, "curves": curves, "standing": now}


def _curve(scheduler: PEGEScheduler, own: Any, name: str) -> Callable[[float], float]:
    found: Callable[[float], float] = getattr(own, name) or getattr(scheduler, name)
    return found


def _history(history: Iterable[Mapping[str, Any]] | str | Path | None) -> list[dict[str, Any]]:
    try:
        if isinstance(history, (str, Path)):
            with path_to_read(history, InputError).open(newline="", encoding="utf-8") as file:
                history = list(csv.DictReader(file))
        return [_row(row) for row in history or ()]
    except OSError as error:
        raise InputError(f"can not read the history {error.filename}: {error.strerror}.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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
    static = files("pege_fx.inspection") / "static"
    read = {name: (static / name).read_text("utf-8") for name in ("report.html", "report.js", "uPlot.min.css")}
    libraries = [(static / n).read_text("utf-8") for n in ("cytoscape.min.js", "cytoscape-dagre.min.js", "uPlot.iife.min.js")]
    parts = {
        "title": html.escape(data["title"]), "styles": read["uPlot.min.css"], "data": json.dumps(data).replace("<", "\\u003c"),
        "libraries": "\n;".join(libraries), "script": read["report.js"],
    }  # fmt: skip
    page = read["report.html"]
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    return page
