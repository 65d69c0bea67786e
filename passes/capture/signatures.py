"""Parameters of a forward as placeholders of a graph."""

import inspect
from typing import Any

from torch.fx import Graph

STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def keywords_behind_star(graph: Graph, forward: Any) -> None:
    """Put keyword-only parameters behind ``*args``, where they belong; fx puts them before it, and takes positions for them."""
    nodes = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    star = next((node for name, node in nodes.items() if name.startswith("*") and not name.startswith("**")), None)
    if star is None:
        return
    parameters = inspect.signature(forward).parameters.values()
    for parameter in reversed([p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in nodes]):
        star.append(nodes[parameter.name])
