"""A prepared model as a networkx graph, and the questions that people ask of it."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from pege_fx.errors import ModelError, closest
from pege_fx.modules.autocast import SWITCHES
from pege_fx.modules.batch_norm import BiasFold, WeightFold
from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.modules.mode import CHECKS, PYTHON_FORWARD, TRAINING_MODE, PythonForward, contains, length
from pege_fx.modules.stages import graph_of
from pege_fx.passes.graph import arguments, function_name, has_attribute, join, module_of, scope, where
from pege_fx.policy.plan import Capture, Operation
from pege_fx.training.scheduler import plan_of

_SIZES = {"shape", "ndim", "dtype", "device", "size", "dim", "numel"}


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
    reason     why an operation, or one of its edges, stays float, or why a module stays Python; ``place`` is the line of
               code that made it so, "" for all that is no such module
    line       "file:line" of the model's code that made the node, "" if it is not known (behind pickle, in torch's own layers)
    about      "values", or "sizes" for what computes shapes and checks arguments
    ========== ==========================================================================================

    An edge has ``bits`` and ``signed`` (of the fake-quant it leaves, else None) and ``kind``: "data", or "graph" where
    a value enters or leaves a nested graph.

    Args:
        gm: from ``prepare``.

    Raises:
        ModelError: if ``gm`` was not prepared.

    >>> import pege_fx
    >>> gm = pege_fx.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)), "W4A4")
    >>> to_networkx(gm).nodes["_0_weight_fq"]["bits"]
    8
    """
    gm = graph_of(gm, "prepared")
    plan = plan_of(gm)
    operations = {(operation.path, operation.node): operation for operation in plan.operations}
    graph = nx.DiGraph(model=plan.model)
    for prefix, inner in _graphs(gm):
        code = _code_lines(inner)
        for node in inner.graph.nodes:
            facts = _facts(prefix, inner, node) | {"code": code.get(node.name, "")}
            graph.add_node(join(prefix, node.name), **facts)
        _add_data_edges(graph, prefix, inner)
    _add_captures(graph, plan.captures)
    for operation in operations.values():
        _add_operation(graph, operation)
    for prefix, inner in _graphs(gm):
        _add_graph_edges(graph, prefix, inner)
    _follow_sizes(graph)
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
    if isinstance(module, PythonForward):
        path, module = "", module.code
    dtype = node.meta.get("dtype")
    return {
        "op": node.op,
        "target": str(node.target) if isinstance(node.target, str) else function_name(node),
        "name": node.name,
        "graph": prefix,
        "path": join(prefix, path) if path or module is not None else "",
        "module": join(prefix, _around(node)),
        "shape": node.meta.get("shape"),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "function": _function(node, module),
        "hidden": node.op == "get_attr" or isinstance(module, (FakeQuant, WeightFold, BiasFold)),
        "quantized": None,
        "reason": "",
        "place": "",
        "line": where(node).strip(" ()"),
        "about": _about(node),
        **_site(module),
    }


def _about(node: Node) -> str:
    """What a node is about by itself; "either" for plain Python, which its arguments decide."""
    if node.target in (*CHECKS, *SWITCHES, length, contains, TRAINING_MODE):
        return "sizes"
    gets = function_name(node) == "getattr"
    if (arguments(node)[0][1] if gets else node.target) in _SIZES and (gets or node.op == "call_method"):
        return "sizes"
    from_python = getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
    return "either" if from_python or node.target is torch._assert else "values"


def _follow_sizes(graph: nx.DiGraph) -> None:
    for key, facts in graph.nodes.items():
        if facts["about"] == "either":
            sources = {graph.nodes[source]["about"] for source in graph.predecessors(key)}
            facts["about"] = "sizes" if sources == {"sizes"} else "values"


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
    is_known = module.is_calibrated and not module.method.is_dynamic
    scale = float(module.method.grid_of().scale.detach().float().mean()) if is_known else None
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
        inputs = node.all_input_nodes
        if module_of(gm, node, FakeQuant) is not None:
            inputs = inputs[:1]  # what shares its scale is no input
        for source in inputs:
            facts = graph.nodes[join(prefix, source.name)]
            graph.add_edge(
                join(prefix, source.name), join(prefix, node.name), bits=facts["bits"], signed=facts["signed"], kind="data"
            )


def _add_graph_edges(graph: nx.DiGraph, prefix: str, gm: GraphModule) -> None:
    """Join a nested graph to the node that calls it, or that hands it to Python code."""
    inner = [(path, module) for path, module in gm.named_modules() if isinstance(module, GraphModule) and module is not gm]
    if not inner:
        return
    for node in gm.graph.nodes:
        if node.op not in ("get_attr", "call_module") or not has_attribute(gm, str(node.target)):
            continue
        for path, nested in inner:
            if path != node.target and (not path.startswith(f"{node.target}.") or _between(gm, str(node.target), path)):
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
    """Join the arguments of a call to what the graph inside takes: Python code in between may hand on something else."""
    placeholders = nested.graph.find_nodes(op="placeholder")
    for value, placeholder in zip(_handed_in(node), placeholders, strict=False):
        if isinstance(value, Node):
            graph.add_edge(join(prefix, value.name), join(inside, placeholder.name), bits=None, signed=None, kind="graph")


def _handed_in(node: Node) -> list[Any]:
    if node.op == "call_module":
        return list(arguments(node)[0])
    forwards = [user for user in node.users if user.op == "call_module" and user.target == PYTHON_FORWARD]
    return [value for call in forwards for value in arguments(call)[0][1].values()]


def _add_captures(graph: nx.DiGraph, captures: Iterable[Capture]) -> None:
    """Say on the nodes of modules that stay Python why they do, and which line made it so."""
    stays = {capture.path: capture for capture in captures if capture.rung == "python"}
    for facts in graph.nodes.values():
        if facts["op"] == "call_module" and facts["path"] in stays:
            capture = stays[facts["path"]]
            facts |= {"reason": f"stays Python: {capture.reason}", "place": capture.place or "its code"}


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
