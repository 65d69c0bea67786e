"""A prepared model as a networkx graph, and the questions that people ask of it."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from pege_fx.batch_norm import BiasFold, WeightFold
from pege_fx.errors import ModelError, closest
from pege_fx.fake_quant import FakeQuant
from pege_fx.passes.graph import arguments, function_name, has_attribute, join, scope
from pege_fx.plan import Capture, Operation
from pege_fx.scheduler import plan_of

CHUNK = 200
"""A module with more children of its own than this is shown in parts."""


def to_networkx(gm: GraphModule) -> nx.DiGraph:
    """Return every node of a prepared model, those inside modules that stay Python too, as a directed graph.

    A node's key is its name in the graph; inside a nested graph, that graph's path, a dot and the name. Attributes:

    ========== ==========================================================================================
    op, target as in ``torch.fx``; the target as text
    name       of the fx node; ``graph`` is the path of the graph that it stands in ("" for the root)
    path       of the module, or of the parameter, that it stands for
    module     path of the module around it
    shape      of its result, where example inputs were given, else None; ``dtype`` likewise, as text
    function   what it computes, in short
    code       its line in ``gm.code``
    bits       of a fake-quant, else None; so too ``signed``, ``kind``, ``method``, ``estimator``, ``rule``, ``group``
    scale      mean over the channels of a calibrated fake-quant, else None
    quantized  True or False for an operation that could be quantized, None for the others
    reason     why an operation, or one of its edges, stays float
    ========== ==========================================================================================

    An edge has ``bits`` and ``signed`` (of the fake-quant it leaves, else None) and ``kind``: "data", or "graph" where
    a value enters or leaves a nested graph.

    Raises:
        ModelError: if ``gm`` was not prepared.

    >>> import pege_fx
    >>> gm = pege_fx.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)), "W4A4")
    >>> to_networkx(gm).nodes["_0_weight_fq"]["bits"]
    8
    """
    operations = {(operation.path, operation.node): operation for operation in plan_of(gm).operations}
    graph = nx.DiGraph(model=plan_of(gm).model)
    for prefix, inner in _graphs(gm):
        code = _code_lines(inner)
        for node in inner.graph.nodes:
            facts = _facts(prefix, inner, node) | {"code": code.get(node.name, "")}
            graph.add_node(join(prefix, node.name), **facts)
        _add_data_edges(graph, prefix, inner)
    _add_captures(graph, plan_of(gm).captures)
    for operation in operations.values():
        _add_operation(graph, operation)
    for prefix, inner in _graphs(gm):
        _add_graph_edges(graph, prefix, inner)
    return graph


def _graphs(gm: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    for path, module in gm.named_modules():
        if isinstance(module, GraphModule):
            yield path, module


def _code_lines(gm: GraphModule) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in str(gm.code).splitlines():
        match = re.match(r"\s+(\w+)(?:\s*:[^=]+)?\s=\s", line)
        if match:
            found.setdefault(match[1], line.split(";  ")[0].strip())
    return found


def _facts(prefix: str, gm: GraphModule, node: Node) -> dict[str, Any]:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    path = node.meta.get("path") or (str(node.target) if node.op in ("call_module", "get_attr") else "")
    dtype = node.meta.get("dtype")
    return {
        "op": node.op,
        "target": str(node.target) if isinstance(node.target, str) else function_name(node),
        "name": node.name,
        "graph": prefix,
        "path": join(prefix, path) if path else "",
        "module": join(prefix, _around(node)),
        "shape": node.meta.get("shape"),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "function": _function(node, module),
        "hidden": node.op == "get_attr" or isinstance(module, (FakeQuant, WeightFold, BiasFold)),
        "quantized": None,
        "reason": "",
        **_site(module),
    }


def _around(node: Node) -> str:
    """The module around a node; for parameters and fake-quants, the module that owns them."""
    if node.op in ("get_attr", "call_module"):
        return str(node.target).rpartition(".")[0]
    return scope(node)


def _function(node: Node, module: torch.nn.Module | None) -> str:
    return type(module).__name__ if module is not None else function_name(node) if node.op.startswith("call") else node.op


def _site(module: torch.nn.Module | None) -> dict[str, Any]:
    if not isinstance(module, FakeQuant):
        names = ("bits", "signed", "kind", "method", "estimator", "granularity", "rule", "group", "scale")
        return dict.fromkeys(names)
    site, spec = module.site, module.site.spec
    scale = float(module.method.step()[0].detach().float().mean()) if module.is_calibrated else None
    return {
        "bits": spec.bits,
        "signed": spec.signed,
        "kind": site.kind,
        "method": str(spec.method),
        "estimator": str(spec.estimator),
        "granularity": spec.granularity,
        "rule": site.rule,
        "group": site.group,
        "scale": scale,
    }


def _add_data_edges(graph: nx.DiGraph, prefix: str, gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            facts = graph.nodes[join(prefix, source.name)]
            graph.add_edge(
                join(prefix, source.name), join(prefix, node.name), bits=facts["bits"], signed=facts["signed"], kind="data"
            )


def _add_graph_edges(graph: nx.DiGraph, prefix: str, gm: GraphModule) -> None:
    """Join a nested graph to the node that calls it, or that hands it to Python code."""
    for node in gm.graph.nodes:
        if node.op not in ("get_attr", "call_module") or not has_attribute(gm, str(node.target)):
            continue
        for path, nested in ((p, m) for p, m in gm.named_modules() if isinstance(m, GraphModule) and m is not gm):
            reached = path == node.target or (path.startswith(f"{node.target}.") and not _between(gm, str(node.target), path))
            if not reached:
                continue
            inside = join(prefix, path)
            _enter(graph, prefix, node, inside, nested)
            for out in nested.graph.find_nodes(op="output"):
                graph.add_edge(join(inside, out.name), join(prefix, node.name), bits=None, signed=None, kind="graph")


def _between(gm: GraphModule, outer: str, path: str) -> bool:
    """Tell whether another graph lies between a module and a graph inside it: that one is joined there."""
    names = path.split(".")
    above = (".".join(names[:count]) for count in range(outer.count(".") + 1, len(names)))
    return any(isinstance(gm.get_submodule(name), GraphModule) for name in above)


def _enter(graph: nx.DiGraph, prefix: str, node: Node, inside: str, nested: GraphModule) -> None:
    if node.op != "call_module":
        return
    placeholders = nested.graph.find_nodes(op="placeholder")
    for value, placeholder in zip(arguments(node)[0], placeholders, strict=False):
        if isinstance(value, Node):
            graph.add_edge(join(prefix, value.name), join(inside, placeholder.name), bits=None, signed=None, kind="graph")


def _add_captures(graph: nx.DiGraph, captures: Iterable[Capture]) -> None:
    """Say on the nodes of modules that stay Python why they do, and which line made it so."""
    stays = {capture.path: capture for capture in captures if capture.rung == "python"}
    for facts in graph.nodes.values():
        if facts["op"] == "call_module" and facts["path"] in stays:
            capture = stays[facts["path"]]
            facts["reason"] = f"stays Python: {capture.reason}" + (f" ({capture.place})" if capture.place else "")


def _add_operation(graph: nx.DiGraph, operation: Operation) -> None:
    key = _key_of(graph, operation)
    if key is None:
        return
    reasons = [operation.reason, *(f"{edge.operand}: {edge.reason}" for edge in operation.edges if edge.reason)]
    facts: dict[str, Any] = {
        "path": operation.path,
        "quantized": any(edge.spec is not None for edge in operation.edges),
        "reason": "; ".join(filter(None, reasons)),
        "batch_norm": operation.batch_norm,
        "parameters": operation.parameters,
        "edges": {edge.operand: _edge_words(edge.spec) for edge in operation.edges},
    }
    graph.nodes[key].update(facts)


def _edge_words(spec: Any) -> str:
    return "float" if spec is None else f"{'s' if spec.signed else 'u'}{spec.bits}"


def _key_of(graph: nx.DiGraph, operation: Operation) -> str | None:
    """The key of an operation: its node's name below the longest part of its path that is a graph with that node."""
    names = operation.path.split(".")
    for count in range(len(names), -1, -1):
        key = join(".".join(names[:count]), operation.node)
        if key in graph and graph.nodes[key]["name"] == operation.node:
            return key
    return None


# --- questions -----------------------------------------------------------------------------------------------


def find(graph: nx.DiGraph, name: str) -> str:
    """Return the key of a node, given its key or the module path of an operation.

    Raises:
        ModelError: if there is no such node; names the closest.
    """
    if name in graph:
        return name
    by_path = [key for key, facts in graph.nodes.items() if facts["path"] == name and not facts["hidden"]]
    if by_path:
        return str(by_path[0])
    known = dict.fromkeys([*graph, *(facts["path"] for facts in graph.nodes.values() if facts["path"])])
    raise ModelError(f"the graph has no node {name!r}.\n  closest: {closest(name, known)}.")


def producers(graph: nx.DiGraph, source: str, target: str) -> list[str]:
    """Return the nodes that make what the edge carries: ``source``, or what feeds it if it is a fake-quant or a fold.

    Raises:
        ModelError: if a node or the edge does not exist.
    """
    start, end = find(graph, source), find(graph, target)
    if not graph.has_edge(start, end):
        inputs = ", ".join(graph.predecessors(end)) or "none"
        raise ModelError(f"no edge leads from {start!r} to {end!r}.\n  inputs of {end}: {inputs}.")
    found, open_nodes = [], [start]
    while open_nodes:
        key = open_nodes.pop()
        between = graph.nodes[key]["hidden"] and graph.nodes[key]["op"] == "call_module"
        open_nodes += list(graph.predecessors(key)) if between else []
        found += [] if between else [key]
    return found


def region(graph: nx.DiGraph, start: str, end: str) -> nx.DiGraph:
    """Return the part of the graph that lies on paths from ``start`` to ``end``, both included; empty if there is none.

    Raises:
        ModelError: if a node does not exist.
    """
    first, last = find(graph, start), find(graph, end)
    after, before = nx.descendants(graph, first) | {first}, nx.ancestors(graph, last) | {last}
    return graph.subgraph(after & before).copy()


def fake_quants_between(graph: nx.DiGraph, start: str, end: str) -> list[str]:
    """Return the fake-quants on paths from ``start`` to ``end``, in the order of the graph.

    Raises:
        ModelError: if a node does not exist.
    """
    inside = region(graph, start, end)
    return [key for key in graph if key in inside and graph.nodes[key]["bits"] is not None]


def without_quantization(graph: nx.DiGraph) -> dict[str, str]:
    """Return the operations that could be quantized and are wholly in float, with the reason."""
    return {key: facts["reason"] for key, facts in graph.nodes.items() if facts["quantized"] is False}


# --- for pictures --------------------------------------------------------------------------------------------


def compact(graph: nx.DiGraph) -> nx.DiGraph:
    """Return the graph without parameters, folds and fake-quants: their bits are on the edges and the operations.

    An operation gets ``weight_bits``; an edge ``bits`` and ``signed`` of the fake-quant that it went through.
    """
    small = nx.DiGraph(**graph.graph)
    shown = [key for key, facts in graph.nodes.items() if not _is_plumbing(graph, key, facts)]
    for key in shown:
        weights = (graph.nodes[source] for source in graph.predecessors(key))
        bits = next((facts["bits"] for facts in weights if facts["kind"] == "weight"), None)
        small.add_node(key, **graph.nodes[key], weight_bits=bits)
    for key in shown:
        for source, bits, signed in _sources(graph, key):
            if source in small:
                _add_edge(small, source, key, bits, signed)
    _chunk(small)
    return small


def _add_edge(graph: nx.DiGraph, source: str, target: str, bits: int | None, signed: bool | None) -> None:
    """Add an edge; of several between two nodes, a quantized one is the one to show."""
    if bits is not None or not graph.has_edge(source, target):
        graph.add_edge(source, target, bits=bits, signed=signed)


def _is_plumbing(graph: nx.DiGraph, key: str, facts: dict[str, Any]) -> bool:
    unused = facts["op"] == "placeholder" and not graph.out_degree(key)
    return bool(facts["hidden"]) or facts["function"] == "TrainingMode" or unused


def _sources(graph: nx.DiGraph, key: str) -> Iterator[tuple[str, int | None, bool | None]]:
    """What a node reads, through hidden nodes, with the bits on the way."""
    open_edges = [(source, graph.nodes[source]["bits"], graph.nodes[source]["signed"]) for source in graph.predecessors(key)]
    while open_edges:
        source, bits, signed = open_edges.pop()
        if not graph.nodes[source]["hidden"]:
            yield source, bits, signed
        else:
            open_edges += [(before, bits, signed) for before in graph.predecessors(source)]


def _chunk(graph: nx.DiGraph) -> None:
    """Split what lies flat in one module into parts that a picture can collapse."""
    siblings: dict[str, list[str]] = {}
    for key, facts in graph.nodes.items():
        siblings.setdefault(facts["module"], []).append(key)
    for module, keys in siblings.items():
        if len(keys) > CHUNK:
            for number, key in enumerate(keys):
                start = number // 100 * 100
                graph.nodes[key]["module"] = join(module, f"nodes {start}-{min(start + 99, len(keys) - 1)}")


def collapse(graph: nx.DiGraph, depth: int) -> nx.DiGraph:
    """Return a compact graph with everything deeper than ``depth`` modules merged into one node for each module."""

    def place(key: str) -> str:
        names = graph.nodes[key]["module"].split(".")
        return key if len(names) <= depth or names == [""] else "module " + ".".join(names[: depth + 1])

    return _merged(graph, place, depth)


def _merged(graph: nx.DiGraph, place: Callable[[str], str], depth: int) -> nx.DiGraph:
    merged = nx.DiGraph(**graph.graph)
    for key, facts in graph.nodes.items():
        home = place(key)
        if home == key:
            merged.add_node(key, **facts)
            continue
        path = home.removeprefix("module ")
        if home not in merged:
            above = ".".join(path.split(".")[:depth])
            merged.add_node(home, path=path, module=above, function="module", members=[], weight_bits=None, op="module")
        merged.nodes[home]["members"].append(facts)
    for source, target, facts in graph.edges(data=True):
        if place(source) != place(target):
            _add_edge(merged, place(source), place(target), facts["bits"], facts["signed"])
    for facts in merged.nodes.values():
        if "members" in facts:
            facts["weight_bits"] = _common(member["weight_bits"] for member in facts["members"])
    return merged


def _common(bits: Iterable[int | None]) -> int | None:
    """The lowest bits of a group, or None if it has none."""
    return min((value for value in bits if value is not None), default=None)
