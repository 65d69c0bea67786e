"""A model's graph as people want to see it: without plumbing, chains in one box, modules opened as far as one can read."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import networkx as nx

from pege_fx.modules.mode import PYTHON_FORWARD

CHUNK = 200
"""A module with more children of its own than this is shown in parts."""


_IN_PLACE = {"iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/="}


def to_display(graph: nx.DiGraph) -> nx.DiGraph:
    """Return a graph of ``to_networkx`` without parameters, folds, fake-quants and what is about sizes, chains in one box.

    A node has the attributes of its first member, and ``members``: these attributes, with ``key``, of all in the chain.
    It has ``weight_bits``, a list, and ``box``, the path of the box to draw it in; an edge has ``bits`` and ``signed`` of
    the fake-quant that it went through, and ``kind``.
    """
    small = compact(graph)
    chained = _merged(small, _chains(small).__getitem__)
    _box(chained)
    return chained


def compact(graph: nx.DiGraph) -> nx.DiGraph:
    """Return the graph with what carries values between operations on its edges, one node for each of the others."""
    small = nx.DiGraph(**graph.graph)
    shown = [key for key, facts in graph.nodes.items() if not _is_plumbing(graph, key, facts)]
    for key in shown:
        facts = graph.nodes[key]
        weights = (graph.nodes[source] for source in graph.predecessors(key))
        own_bits = sorted({source["bits"] for source in weights if source["kind"] == "weight"})
        inside = facts["path"] if facts["path"] != facts["module"] else ""  # else a module that is one operation
        module = facts["module"] if inside or not facts["path"] else facts["path"].rpartition(".")[0]
        small.add_node(key, **(facts | {"key": key, "module": module, "weight_bits": own_bits}))
    for key in shown:
        for source, bits, signed, kind in _sources(graph, key):
            if source in small:
                _add_edge(small, source, key, bits, signed, kind)
    return small


def _add_edge(graph: nx.DiGraph, source: str, target: str, bits: int | None, signed: bool | None, kind: str) -> None:
    """Add an edge; of several between two nodes, a quantized one is the one to show."""
    if bits is not None or not graph.has_edge(source, target):
        graph.add_edge(source, target, bits=bits, signed=signed, kind=kind)


def _is_plumbing(graph: nx.DiGraph, key: str, facts: dict[str, Any]) -> bool:
    if facts["hidden"] or facts["about"] == "sizes":
        return True
    if facts["op"] == "placeholder":  # of a graph inside: what comes in is on the edge, if it is known
        return bool(graph.in_degree(key)) or not graph.out_degree(key)
    return facts["op"] == "output" and bool(facts["graph"])


def _sources(graph: nx.DiGraph, key: str) -> Iterator[tuple[str, int | None, bool | None, str]]:
    """What a node reads, through plumbing, with the bits of the nearest fake-quant on the way."""
    waiting: list[tuple[str, int | None, bool | None, str]] = [(key, None, None, "data")]
    while waiting:
        reader, bits, signed, kind = waiting.pop()
        for source in graph.predecessors(reader):
            facts = graph.nodes[source]
            if facts["about"] == "sizes":
                continue
            found = (facts["bits"], facts["signed"]) if bits is None else (bits, signed)
            way = (source, *found, "graph" if "graph" in (kind, graph.edges[source, reader]["kind"]) else "data")
            if _is_plumbing(graph, source, facts):
                waiting.append(way)
            else:
                yield way


def _chains(graph: nx.DiGraph) -> dict[str, str]:
    """The head of each node's chain: a node joins the only one it reads if it is that one's only reader, in its module."""
    head: dict[str, str] = {}
    for key, facts in graph.nodes.items():
        head[key] = key
        sources = list(graph.predecessors(key))
        if len(sources) != 1 or facts["quantized"] is not None or facts["op"] == "output" or sources[0] not in head:
            continue
        before, edge = graph.nodes[sources[0]], graph.edges[sources[0], key]
        alone = graph.out_degree(sources[0]) == 1 and before["op"] != "placeholder" and before["module"] == facts["module"]
        if alone and edge["bits"] is None and edge["kind"] == "data" and not before["place"] and not facts["place"]:
            head[key] = head[sources[0]]
    return head


def _box(graph: nx.DiGraph) -> None:
    """Give each node its ``box``: the module around it that holds more than this node, with parts as "0-99" in large ones.

    ``name_in_box`` is its path as seen from there.
    """
    held = Counter(path for module in nx.get_node_attributes(graph, "module").values() for path in _around(module))
    ways, inside = {}, defaultdict[str, dict[str, int]](dict)
    for key, facts in graph.nodes.items():
        around = [path for path in _around(facts["module"]) if held[path] > 1]
        facts["name_in_box"] = _own_name(facts, around[-1] if around else "")
        ways[key] = ["", *around, f"node {key}"]
        for above, below in itertools.pairwise(ways[key]):
            inside[above].setdefault(below, len(inside[above]))
    for key, way in ways.items():
        names = []
        for above, below in itertools.pairwise(way):
            if (count := len(inside[above])) > CHUNK:
                start = inside[above][below] // 100 * 100
                names.append(f"{start}-{min(start + 99, count - 1)}")
            names.append(below.rpartition(".")[2])
        graph.nodes[key]["box"] = ".".join(names[:-1])


def _own_name(facts: dict[str, Any], module: str) -> str:
    if facts["target"] == PYTHON_FORWARD:
        return str(facts["function"])
    return str(facts["path"] or facts["name"]).removeprefix(f"{module}." if module else "")


# --- modules as boxes ------------------------------------------------------------------------------------------


def collapse(graph: nx.DiGraph, depth: int) -> nx.DiGraph:
    """Return a display graph with everything deeper than ``depth`` modules merged into one node for each module."""
    return _shut(graph, lambda path: path.count(".") < depth)


def collapse_to_fit(graph: nx.DiGraph, most: int) -> nx.DiGraph:
    """Return a display graph with modules opened from the outside in, siblings together, as long as ``most`` nodes suffice."""
    inside: dict[str, set[str]] = {"": set()}
    for key, facts in graph.nodes.items():
        inner = key
        for path in [*reversed(_around(facts["box"])), ""]:
            inside.setdefault(path, set()).add(inner)
            inner = f"module {path}"
    count, opened, waiting = len(inside[""]), {""}, [""]
    for path in waiting:  # grows
        children = [child.removeprefix("module ") for child in sorted(inside[path]) if child.startswith("module ")]
        more = sum(len(inside[child]) - 1 for child in children)
        if count + more <= most:
            count += more
            opened.update(children)
            waiting += children
    return _shut(graph, opened.__contains__)


def _around(module: str) -> list[str]:
    """The path of a module and of those around it, from the outside in."""
    names = module.split(".") if module else []
    return [".".join(names[: count + 1]) for count in range(len(names))]


def _shut(graph: nx.DiGraph, is_open: Callable[[str], bool]) -> nx.DiGraph:
    def place(key: str) -> str:
        shut = next((path for path in _around(graph.nodes[key]["box"]) if not is_open(path)), None)
        return key if shut is None else f"module {shut}"

    return _merged(graph, place)


def _merged(graph: nx.DiGraph, place: Callable[[str], str]) -> nx.DiGraph:
    """Merge the nodes of each place into one: that of the place's name, or one that stands for a module."""
    merged = nx.DiGraph(**graph.graph)
    for key, facts in graph.nodes.items():
        home = place(key)
        if home not in merged:
            merged.add_node(home, **(facts if home == key else _module(home.removeprefix("module "))) | {"members": []})
        merged.nodes[home]["members"] += facts.get("members", [facts])
    for source, target, facts in graph.edges(data=True):
        if place(source) != place(target):
            _add_edge(merged, place(source), place(target), facts["bits"], facts["signed"], facts["kind"])
    for facts in merged.nodes.values():
        facts["weight_bits"] = sorted({bits for member in facts["members"] for bits in member["weight_bits"]})
    return merged


def _module(path: str) -> dict[str, Any]:
    above = path.rpartition(".")[0]
    return {"path": path, "module": above, "box": above, "op": "module", "function": "", "place": "", "quantized": None}


# --- words -----------------------------------------------------------------------------------------------------


def title(facts: dict[str, Any]) -> str:
    """Name a node's first member within its box, and say what it does: "conv1 conv2d W4"."""
    if facts["op"] == "module":
        return str(facts["path"]).rpartition(".")[2] + weight_label(facts)
    name, function = str(facts["name_in_box"]), _function(facts)
    same = name.rstrip("0123456789_") == function.rstrip("0123456789_")
    words = _IN_PLACE.get(function, function) if same else name if function == facts["op"] else f"{name} {function}"
    return words + weight_label(facts)


def rest(facts: dict[str, Any]) -> str:
    """Say what else a node holds: the followers in its chain, or how much is in a module."""
    members = facts["members"]
    if facts["op"] == "module":
        operations = sum(member["quantized"] is not None for member in members)
        return f"{len(members)} nodes, {operations} operation{'s' * (operations != 1)}"
    if facts["place"]:
        return f"stays Python: {facts['place'].rpartition('/')[2]}"
    return " · ".join(map(_short, members[1:]))


def weight_label(facts: dict[str, Any]) -> str:
    """Return " W4", " W4/W8" for a module with both, "" without a weight that is quantized."""
    return " " * bool(facts["weight_bits"]) + "/".join(f"W{bits}" for bits in facts["weight_bits"])


def edge_label(facts: dict[str, Any]) -> str:
    """Return an edge's bits and sign as "u4"; "" for float."""
    return "" if facts["bits"] is None else f"{'s' if facts['signed'] else 'u'}{facts['bits']}"


def shape_label(facts: dict[str, Any]) -> str:
    """Return the shape of a node's result as "1×3×224×224", "" if it is not known."""
    return "×".join(map(str, facts.get("shape") or ()))


def _function(facts: dict[str, Any]) -> str:
    name = str(facts["function"])
    return f"{name.removeprefix('Folded')} (folded)" if name.startswith("Folded") else name


def _short(facts: dict[str, Any]) -> str:
    """The name of a module's attribute; what it does where that is a number, or no module."""
    name, function = facts["path"].rpartition(".")[2], _function(facts)
    if facts["op"] != "call_module" or name.isdecimal():
        return _IN_PLACE.get(function, function)
    return f"{name} (folded)" if function.endswith(" (folded)") else str(name)
