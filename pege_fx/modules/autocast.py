"""Where autocast is switched off inside a graph: two nodes, and a ``try`` between them in the code that a graph becomes.

``with torch.autocast(device, enabled=False)`` keeps arithmetic in the types that it is written in, whoever calls the model.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.fx import Graph


@torch.fx.has_side_effect
def switch_autocast_off(_: Any, device: str) -> bool:
    """Switch autocast off, and return whether it was on.

    Args:
        _: a value of the graph, without which a tracer of the generated code would call this instead of writing it down.
        device: type of the devices.
    """
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, False)
    return before


@torch.fx.has_side_effect
def switch_autocast_back(before: bool, device: str) -> None:
    """Let autocast be what ``switch_autocast_off`` found."""
    torch.set_autocast_enabled(device, before)


SWITCHES = (switch_autocast_off, switch_autocast_back)


def guard_regions(graph: Graph) -> None:
    """Let the code of a graph switch autocast back also where what lies between fails; a graph keeps this in copies."""
    if graph.find_nodes(op="call_function", target=switch_autocast_off):
        graph.on_generate_code(_guarded)


def _guarded(before: Callable[[list[str]], list[str]] | None) -> Callable[[list[str]], list[str]]:
    return _with_regions


def _with_regions(body: list[str]) -> list[str]:
    """Indent what lies between the two calls below a ``try``, and put the second below ``finally``; they may be nested."""
    made: list[str] = []
    depth = 0
    for line in "".join(body).splitlines():  # its parts are no lines
        is_end = re.match(r"\w+ = \w*switch_autocast_back\(", line) is not None
        depth -= is_end
        made += ["    " * depth + "finally:"] * is_end
        made.append("    " * (depth + is_end) + line)
        if re.match(r"\w+ = \w*switch_autocast_off\(", line):
            made += ["    " * depth + "try:", "    " * (depth + 1) + "pass"]
            depth += 1
    return ["\n".join(made), "\n"]
