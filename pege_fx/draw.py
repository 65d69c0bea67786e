"""Pictures of a prepared model, laid out by Graphviz."""

from pathlib import Path
from typing import Any

import graphviz
import networkx as nx
from torch.fx import GraphModule

from pege_fx.dataflow import collapse, compact, to_networkx
from pege_fx.errors import ExportError

ENDINGS = (".svg", ".png", ".dot")
COLOURS = {2: "#b40426", 3: "#dd5f4b", 4: "#f4987a", 5: "#edd1c2", 6: "#c9d7f0", 7: "#9abbff", 8: "#6788ee"}
FLOAT, PLAIN = "#d9d9d9", "#ffffff"
MOST_NODES = 100


def draw(gm: GraphModule, path: str | Path, *, depth: int | None = None) -> None:
    """Draw a prepared model: modules as boxes, weights' bits as colours, activations' bits and sign on the edges.

    Parameters, folded BatchNorms and fake-quants are not drawn as nodes: an edge labelled ``u4`` carries an
    activation in four unsigned bits, ``s8`` in eight signed ones, and one without a label is float.

    Args:
        gm: from ``prepare``.
        path: ends in .svg, .png or .dot; .dot needs no system tool.
        depth: merge what lies deeper than this many modules into one node for each; None draws everything, or as much
            as a reader can follow (100 nodes).

    Raises:
        ExportError: for another ending, a path that can not be written, a negative depth, or if Graphviz's ``dot``
            is not installed (the .dot is written then).
        ModelError: if ``gm`` was not prepared.
    """
    target = Path(path)
    if target.suffix.lower() not in ENDINGS:
        raise ExportError(f"{target.name!r} has the ending {target.suffix!r}: give one of {', '.join(ENDINGS)}.")
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise ExportError(f"depth={depth!r}: give a whole number of modules, 0 or more, or None for all that fits.")
    picture = _picture(_collapsed(compact(to_networkx(gm)), depth))
    try:
        if target.suffix.lower() == ".dot":
            target.write_text(picture.source, encoding="utf-8")
        else:
            target.write_bytes(picture.pipe(format=target.suffix[1:].lower()))
    except graphviz.ExecutableNotFound:
        beside = target.with_suffix(".dot")
        beside.write_text(picture.source, encoding="utf-8")
        raise ExportError(
            f"{target.name} needs Graphviz's dot, which is not installed; {beside} was written instead.\n"
            "  install it (apt install graphviz, brew install graphviz, conda install graphviz) and draw again,\n"
            f"  or run dot -T{target.suffix[1:]} where it is; pege_fx.report needs no system tool."
        ) from None
    except OSError as error:
        raise ExportError(f"can not write {target}: {error.strerror or error}; choose another path.") from error


def _collapsed(graph: nx.DiGraph, depth: int | None) -> nx.DiGraph:
    if depth is not None:
        return collapse(graph, depth)
    deepest = max((facts["module"].count(".") + 1 for facts in graph.nodes.values()), default=0)
    for level in range(deepest, 0, -1):
        smaller = collapse(graph, level)
        if len(smaller) <= MOST_NODES:
            return smaller
    return collapse(graph, 0)


def _picture(graph: nx.DiGraph) -> graphviz.Digraph:
    picture = graphviz.Digraph(str(graph.graph["model"]))
    picture.attr("graph", rankdir="TB", fontname="Helvetica", fontsize="11", ranksep="0.3", nodesep="0.2", label=_legend(graph))
    picture.attr(
        "node", shape="box", style="filled,rounded", fontname="Helvetica", fontsize="11", margin="0.1,0.04", height="0.3"
    )
    picture.attr("edge", fontname="Helvetica", fontsize="10", arrowsize="0.6", color="#555555")
    names = {key: f"n{number}" for number, key in enumerate(graph)}
    _clusters(picture, graph, names, "", _children(graph))
    for source, target, facts in graph.edges(data=True):
        picture.edge(names[source], names[target], label=edge_label(facts), color="#555555" if facts["bits"] else "#aaaaaa")
    return picture


def _legend(graph: nx.DiGraph) -> str:
    used = sorted({facts["weight_bits"] for facts in graph.nodes.values() if facts["weight_bits"]})
    bits = ", ".join(f"W{value}" for value in used) or "no quantized weights"
    return f"{graph.graph['model']}: {bits}; edges: u unsigned, s signed, bits; grey: operation in float"


def edge_label(facts: dict[str, Any]) -> str:
    """Return an edge's bits and sign as "u4"; "" for float."""
    return "" if facts["bits"] is None else f"{'s' if facts['signed'] else 'u'}{facts['bits']}"


def _children(graph: nx.DiGraph) -> dict[str, tuple[set[str], list[str]]]:
    """Modules by path: the modules and the nodes directly inside."""
    inside: dict[str, tuple[set[str], list[str]]] = {"": (set(), [])}
    for key, facts in graph.nodes.items():
        path = facts["module"]
        inside.setdefault(path, (set(), []))[1].append(key)
        while path:
            above = path.rpartition(".")[0]
            inside.setdefault(above, (set(), []))[0].add(path)
            path = above
    return inside


def _clusters(
    picture: graphviz.Digraph,
    graph: nx.DiGraph,
    names: dict[str, str],
    path: str,
    inside: dict[str, tuple[set[str], list[str]]],
) -> None:
    modules, keys = inside[path]
    for key in keys:
        picture.node(names[key], **_node(graph.nodes[key]))
    for module in sorted(modules):
        with picture.subgraph(name=f"cluster_{module}") as cluster:
            cluster.attr(label=graphviz.escape(module), style="rounded", color="#8899aa", labeljust="l")
            _clusters(cluster, graph, names, module, inside)


def _node(facts: dict[str, Any]) -> dict[str, str]:
    bits = facts["weight_bits"]
    if facts["function"] == "module":
        operations = [member for member in facts["members"] if member["quantized"] is not None]
        words = f"{facts['path']}\n{len(facts['members'])} nodes, {len(operations)} operations"
    else:
        own = facts["path"] or facts["name"]
        words = f"{own.removeprefix(facts['module'] + '.')}\n{facts['function']}" if own != facts["function"] else own
    colour = COLOURS[bits] if bits else FLOAT if facts.get("quantized") is False else PLAIN
    fontcolor = "#ffffff" if bits in (2, 3) else "#000000"
    suffix = f" W{bits}" if bits else "\nstays Python" if facts.get("reason", "").startswith("stays Python") else ""
    return {
        "label": graphviz.escape(words + suffix),
        "fillcolor": colour,
        "fontcolor": fontcolor,
        "tooltip": graphviz.escape(facts.get("reason", "")),
    }
