"""Pictures of a prepared model, laid out by Graphviz."""

import html
from pathlib import Path
from typing import Any

import graphviz
import networkx as nx
from torch.fx import GraphModule

from pege_fx._utils.files import atomic_write, path_of
from pege_fx.errors import ExportError
from pege_fx.inspection.dataflow import to_networkx
from pege_fx.inspection.display_graph import collapse, collapse_to_fit, edge_label, rest, shape_label, title, to_display

ENDINGS = (".svg", ".png", ".dot")
COLOURS = {2: "#b40426", 3: "#dd5f4b", 4: "#f4987a", 5: "#edd1c2", 6: "#c9d7f0", 7: "#9abbff", 8: "#6788ee"}
FLOAT, PYTHON, PLAIN = "#d0d0d0", "#fff3b0", "#ffffff"
FONT = "Helvetica"
MOST_NODES = 60


def draw(gm: GraphModule, path: str | Path, *, depth: int | None = None) -> None:
    """Draw a prepared model: modules as boxes, weights' bits as colours, activations' bits and sign on the edges.

    Parameters and fake-quants are not drawn as nodes: an edge labelled ``u4`` carries an activation in four unsigned
    bits, ``s8`` in eight signed ones, and one without a label is float. What only follows an operation (BatchNorm,
    ReLU, dropout) is in its box; what only computes sizes is left out. Dashed: Python code hands the value on.

    Args:
        gm: from ``prepare``.
        path: ends in .svg, .png or .dot; .dot needs no system tool.
        depth: merge what lies deeper than this many modules into one node for each; None opens modules from the outside
            in, as far as a reader can follow (60 nodes).

    Raises:
        ExportError: for another ending, a path that can not be written, a negative depth, or if Graphviz's ``dot``
            is not installed (the .dot is written then).
        ModelError: if ``gm`` was not prepared.

    >>> import tempfile
    >>> import torch
    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     draw(gm, f"{folder}/model.dot")
    """
    target = path_of(path)
    if target.suffix.lower() not in ENDINGS:
        raise ExportError(f"{target.name!r} has the ending {target.suffix!r}: give one of {', '.join(ENDINGS)}.")
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise ExportError(f"depth={depth!r}: give a whole number of modules, 0 or more, or None for all that fits.")
    picture = _picture(_collapsed(to_display(to_networkx(gm)), depth))
    ending = target.suffix[1:].lower()
    try:
        _write(target, picture.source.encode() if ending == "dot" else picture.pipe(format=ending))
    except graphviz.ExecutableNotFound:
        beside = target.with_suffix(".dot")
        _write(beside, picture.source.encode())
        raise ExportError(
            f"{target.name} needs Graphviz's dot, which is not installed; {beside} was written instead.\n"
            "  install it (apt install graphviz, brew install graphviz, conda install graphviz) and draw again,\n"
            f"  or run dot -T{ending} where it is; pege_fx.report needs no system tool."
        ) from None


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def _collapsed(graph: nx.DiGraph, depth: int | None) -> nx.DiGraph:
    return collapse_to_fit(graph, MOST_NODES) if depth is None else collapse(graph, depth)


def _picture(graph: nx.DiGraph) -> graphviz.Digraph:
    picture = graphviz.Digraph(str(graph.graph["model"]))
    picture.attr("graph", rankdir="TB", fontname=FONT, fontsize="11", ranksep="0.22", nodesep="0.2", bgcolor="#ffffff")
    picture.attr("graph", label=_legend(graph), labelloc="t")
    picture.attr("node", shape="box", style="filled,rounded", fontname=FONT, fontsize="11", margin="0.1,0.04", height="0.3")
    picture.attr("edge", fontname=FONT, fontsize="10", arrowsize="0.6")
    names = {key: f"n{number}" for number, key in enumerate(graph)}
    _clusters(picture, graph, names, "", _children(graph))
    for source, target, facts in graph.edges(data=True):
        style = "dashed" if facts["kind"] == "graph" else "solid"
        colour = "#222222" if facts["bits"] else "#999999"
        label = f" {found}" if (found := edge_label(facts)) else ""  # not on the line
        picture.edge(names[source], names[target], label=label, color=colour, style=style)
    return picture


def _legend(graph: nx.DiGraph) -> str:
    """The model, and a swatch for each colour, as Graphviz writes tables."""
    used = sorted({bits for facts in graph.nodes.values() for bits in facts["weight_bits"]})
    cells = [(COLOURS[bits], f"{bits}-bit weight") for bits in used]
    members = [member for facts in graph.nodes.values() for member in facts["members"]]
    cells += [(FLOAT, "left in float")] * any(member["quantized"] is False for member in members)
    cells += [(PYTHON, "stays Python")] * any(member["place"] for member in members)
    swatches = "".join(f'<TD BGCOLOR="{colour}"><FONT COLOR="{ink(colour)}">{words}</FONT></TD>' for colour, words in cells)
    edges = "u4: activation in 4 unsigned bits, s: signed; grey: float"
    edges += "; dashed: by way of Python" * any(kind == "graph" for _, _, kind in graph.edges(data="kind"))
    name = html.escape(str(graph.graph["model"]))
    first = f"<TR><TD><B>{name}</B></TD>{swatches}</TR>"
    second = f'<TR><TD ALIGN="LEFT" COLSPAN="{len(cells) + 1}"><FONT POINT-SIZE="10">{edges}</FONT></TD></TR>'
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="4">{first}{second}</TABLE>>'


def _children(graph: nx.DiGraph) -> dict[str, tuple[dict[str, None], list[str]]]:
    """Boxes by path: the boxes and the nodes directly inside."""
    inside: dict[str, tuple[dict[str, None], list[str]]] = {"": ({}, [])}
    for key, facts in graph.nodes.items():
        path = facts["box"]
        inside.setdefault(path, ({}, []))[1].append(key)
        while path:
            above = path.rpartition(".")[0]
            inside.setdefault(above, ({}, []))[0][path] = None
            path = above
    return inside


def _clusters(
    picture: graphviz.Digraph,
    graph: nx.DiGraph,
    names: dict[str, str],
    path: str,
    inside: dict[str, tuple[dict[str, None], list[str]]],
) -> None:
    modules, keys = inside[path]
    for key in keys:
        picture.node(names[key], **_node(graph.nodes[key]))
    for module in modules:
        with picture.subgraph(name=f"cluster_{module}") as cluster:
            cluster.attr(label=graphviz.escape(module), style="rounded", color="#8899aa", labeljust="l", labelloc="t")
            _clusters(cluster, graph, names, module, inside)


def _node(facts: dict[str, Any]) -> dict[str, str]:
    below = shape_label(facts) if facts["op"] == "placeholder" else rest(facts)
    small = f'<BR/><FONT POINT-SIZE="9">{html.escape(below)}</FONT>' if below else ""
    colour = colour_of(facts)
    reasons = [f"{member['key']}: {member['reason']}" for member in facts["members"] if member["reason"]]
    return {
        "label": f"<{html.escape(title(facts))}{small}>",
        "fillcolor": colour,
        "fontcolor": ink(colour),
        "tooltip": graphviz.escape("\n".join(reasons[:10]) or title(facts)),
    }


def colour_of(facts: dict[str, Any]) -> str:
    """Return the colour of a node of a display graph: by its weight's bits, the lowest if there are several."""
    if facts["weight_bits"]:
        return COLOURS[facts["weight_bits"][0]]
    return PYTHON if facts["place"] else FLOAT if facts["quantized"] is False else PLAIN


def ink(colour: str) -> str:
    """Return black or white, whichever is read on a colour."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "#ffffff"
