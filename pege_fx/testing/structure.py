"""What a graph looks like: compared with a sketch, or with another graph up to nodes that a pass put in or took out."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, TypeAlias

import networkx as nx
from torch import nn
from torch.fx import GraphModule, Node

from pege_fx.errors import InputError
from pege_fx.inspection.size import graphs_of
from pege_fx.passes.graph import arguments, function_name, map_nodes, module_of

Removed: TypeAlias = "str | type[nn.Module] | Callable[[Node], bool] | Iterable[Any]"

_NAMED = {"placeholder": "input", "output": "output", "get_attr": "attribute"}


def kind_of(gm: GraphModule, node: Node) -> str:
    """Return what a node is: "input", "output", "attribute", a module's class, or a function's or method's name."""
    module = module_of(gm, node, nn.Module)
    return type(module).__name__ if module is not None else _NAMED.get(node.op) or function_name(node)


def structure(gm: GraphModule, removed: Removed = ()) -> nx.DiGraph:
    """Return the nodes of a graph and of those nested inside it, without the removed ones, as a directed graph.

    A node has a ``kind`` (see ``kind_of``) and ``constants``: its other arguments, as text
    (of an input: which one it is). An edge has ``positions``:
    which arguments the value is. Whoever read a removed node reads what it read.

    Args:
        removed: kinds, module classes or functions of a node that say which to leave out; one, or several.
    """
    graph, leave_out = nx.DiGraph(), _chooser(removed)
    for path, inner in graphs_of(gm):
        inputs = {node: number for number, node in enumerate(inner.graph.find_nodes(op="placeholder"))}
        for node in inner.graph.nodes:
            key = (path, node.name)
            constants = str(inputs[node]) if node in inputs else _constants(node)
            graph.add_node(key, kind=kind_of(inner, node), constants=constants, removed=leave_out(inner, node))
            for position, source in enumerate(_operands(node)):
                _connect(graph, (path, source.name), key, (position,))
    for key in [key for key, facts in graph.nodes(data=True) if facts["removed"]]:
        for source in list(graph.predecessors(key)):
            for reader in list(graph.successors(key)):
                _connect(graph, source, reader, graph.edges[key, reader]["positions"])
        graph.remove_node(key)
    return graph


def _connect(graph: nx.DiGraph, source: Any, target: Any, positions: tuple[int, ...]) -> None:
    known = graph.edges[source, target]["positions"] if graph.has_edge(source, target) else ()
    graph.add_edge(source, target, positions=tuple(sorted({*known, *positions})))


def _operands(node: Node) -> list[Node]:
    found: list[Node] = []
    map_nodes(arguments(node), lambda source: found.append(source))
    return found


def _constants(node: Node) -> str:
    return repr(map_nodes(arguments(node), lambda source: _PLACE))


class _Place:
    def __repr__(self) -> str:
        return "_"


_PLACE: Any = _Place()


def _chooser(removed: Removed) -> Callable[[GraphModule, Node], bool]:
    if isinstance(removed, str):
        return lambda gm, node: kind_of(gm, node) == removed
    if isinstance(removed, type):
        return lambda gm, node: module_of(gm, node, removed) is not None
    if isinstance(removed, Iterable):
        choosers = [_chooser(one) for one in removed]
        return lambda gm, node: any(choose(gm, node) for choose in choosers)
    if callable(removed):
        return lambda gm, node: bool(removed(node))
    raise InputError(f"removed={removed!r}: give kinds of nodes, module classes, or a function of a node.")


def isomorphic_up_to(gm: GraphModule, original: GraphModule, removed: Removed = ()) -> bool:
    """Tell whether two graphs are the same but for names, the order of independent nodes, and the removed nodes.

    The same operation, by kind and constant arguments, on the same operands in the same positions; modules' settings and
    values do not count. Nodes may be removed from either graph.

    >>> from torch.fx import symbolic_trace
    >>> plain = symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> normed = symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()))
    >>> isomorphic_up_to(normed, plain, nn.BatchNorm1d), isomorphic_up_to(normed, plain)
    (True, False)
    """
    a, b = (_with_ancestry(structure(graph, removed)) for graph in (gm, original))
    return bool(nx.is_isomorphic(a, b, node_match=_equal, edge_match=_equal))


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a == b


def _with_ancestry(graph: nx.DiGraph) -> nx.DiGraph:
    """Note for each node, in short, what it computes of the inputs: then an isomorphism is found without search."""
    for key in nx.topological_sort(graph):
        facts = graph.nodes[key]
        sources = sorted(
            (data["positions"], graph.nodes[source]["ancestry"]) for source, _, data in graph.in_edges(key, data=True)
        )
        facts["ancestry"] = hash((facts["kind"], facts["constants"], tuple(sources)))
    return graph


# --- sketches -------------------------------------------------------------------------------------------------

_WORD = re.compile(r"(?:(\w+)\s*:\s*)?([\w.]+)")


def assert_graph(gm: GraphModule, *chains: str, removed: Removed = ()) -> None:
    """Assert that a graph has exactly these nodes and edges, written as chains from producer to reader.

    A word is a new node of that kind (see ``kind_of``); ``name: kind`` is one too, and ``name`` alone means it again.

    Args:
        gm: any graph; graphs nested inside it are part of it.
        chains: ``"input -> c: conv2d -> relu -> a: add -> output"``, ``"c -> a"``.
        removed: nodes to look past, as in ``structure``.

    Raises:
        AssertionError: if the graph is another one; the message has its chains, to be copied if they are right.
        InputError: for chains that can not be read.

    >>> from torch.fx import symbolic_trace
    >>> gm = symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> assert_graph(gm, "input -> Linear -> ReLU -> output")
    """
    found, expected = structure(gm, removed), _parsed(chains)
    if not nx.is_isomorphic(found, expected, node_match=lambda a, b: bool(a["kind"] == b["kind"])):
        lines = "\n".join(f"  {chain!r}," for chain in sketch(found))
        raise AssertionError(f"the graph is another one than expected. It is:\n{lines}")


def _parsed(chains: Iterable[str]) -> nx.DiGraph:
    graph = nx.DiGraph()
    names: dict[str, str] = {}
    for chain in chains:
        keys = []
        for word in chain.split("->"):
            read = _WORD.fullmatch(word.strip())
            if read is None:
                raise InputError(f"{word.strip()!r} in {chain!r}: write a kind of node, name: kind, or a name.")
            name, kind = read.groups()
            if name in names:
                raise InputError(f"{name!r} names two nodes in {chain!r}.")
            key = names.get(kind) if name is None else None
            if key is None:
                key = str(len(graph))
                graph.add_node(key, kind=kind)
                if name is not None:
                    names[name] = key
            keys.append(key)
        graph.add_edges_from(pairwise(keys))
    return graph


def sketch(graph: nx.DiGraph) -> list[str]:
    """Return a graph of ``structure`` as the chains that ``assert_graph`` reads."""
    uncovered = nx.DiGraph(graph.edges)
    paths = [path for key in nx.topological_sort(graph) for path in _paths(uncovered, key)]
    paths += [[key] for key in graph if not graph.degree(key)]
    counts = Counter(key for path in paths for key in path)
    kinds = {str(kind) for _, kind in graph.nodes(data="kind")}
    seen: set[Any] = set()

    def word(key: Any) -> str:
        kind, name = str(graph.nodes[key]["kind"]), re.sub(r"\W", "_", "_".join(filter(None, key)))
        name += "_" * (name in kinds)
        is_new = key not in seen
        seen.add(key)
        return kind if counts[key] == 1 else f"{name}: {kind}" if is_new else name

    return [" -> ".join(map(word, path)) for path in paths]


def _paths(uncovered: nx.DiGraph, key: Any) -> Iterator[list[Any]]:
    """Take edges away from a node on, one path after another, until it has none left."""
    while key in uncovered and uncovered.out_degree(key):
        path = [key]
        while readers := list(uncovered.successors(path[-1])):
            uncovered.remove_edge(path[-1], readers[0])
            path.append(readers[0])
        yield path
