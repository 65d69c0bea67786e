"""In-place writes: what reads a tensor after a write gets a node of its own, so that order becomes data flow.

Later passes may then share, move or prove things of a node's value without asking what happened to its memory meanwhile.
"""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from pege_fx.modules.mode import TRAINING_MODE, written
from pege_fx.passes.graph import (
    after,
    attribute_name,
    attribute_of,
    call_function,
    changes_its_input,
    first_argument,
    is_assignment,
    is_unknown_code,
    reads_size,
    remove_dead_nodes,
)

# Functions and methods whose result may be, or look into, the memory of their first argument.
_VIEWING: set[Any] = {
    operator.getitem, torch.reshape, torch.flatten, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk,
    torch.split, torch.tensor_split, torch.unbind, torch.narrow, torch.select, torch.movedim, torch.swapaxes, torch.dropout,
    torch.unflatten, torch.diagonal, torch.real, torch.imag, torch.view_as_real, torch.view_as_complex, torch.detach,
    torch.broadcast_to, torch.ravel, torch.atleast_1d, torch.atleast_2d, torch.atleast_3d,
    nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d,
    "view", "view_as", "reshape", "reshape_as", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split",
    "tensor_split", "unbind", "narrow", "select", "movedim", "swapaxes", "unflatten", "expand", "expand_as", "diagonal", "t",
    "contiguous", "to", "type", "type_as", "float", "half", "bfloat16", "double", "cpu", "cuda", "detach", "broadcast_to",
    "ravel", "unfold", "as_strided", "requires_grad_", "__getitem__",
}  # fmt: skip
_VIEWING_ATTRIBUTES = {"T", "mT", "H", "mH", "data", "real", "imag"}
_VIEWING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def name_writes(gm: GraphModule) -> None:
    """Let whatever reads a tensor after a write read the node that wrote, or a ``written`` node behind it.

    Writes are in-place operations and assignments, also through views, and what functions and modules that the graph does
    not look into were seen to do on the example inputs (``meta["writes"]``).
    """
    memory = _Memory(gm)
    for node in list(gm.graph.nodes):
        if not reads_size(node):
            for source in node.all_input_nodes:
                node.replace_input_with(source, memory.latest(source))
        memory.add(node)
    remove_dead_nodes(gm)


class _Memory:
    """Which nodes share memory, and which node has the value of another one after a write."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self._sharing: dict[Node, set[Node]] = {}
        self._later: dict[Node, Node] = {}
        self._stale: dict[Node, Node] = {}
        self._place = {node: place for place, node in enumerate(gm.graph.nodes)}
        reads = ((source, self._place[node]) for node in gm.graph.nodes for source in node.all_input_nodes)
        self._last_read = defaultdict(int, reads)

    def latest(self, node: Node) -> Node:
        """Return the node that has the present value of ``node``'s tensor."""
        while node in self._later:
            node = self._later[node]
        if (write := self._stale.pop(node, None)) is not None:
            name = f"{node.name}_written"
            made = call_function(self.gm.graph, written, (node,), {}, after(write), name)
            made.meta.update({key: node.meta[key] for key in ("rank", "shape", "dtype", "nn_module_stack") if key in node.meta})
            self._join(made, [node])
            self._replace(node, made)
            return made
        return node

    def add(self, node: Node) -> None:
        self._join(node, _may_share(self.gm, node))
        if is_unknown_code(self.gm, node):
            for source in node.meta.get("writes", ()):
                self._write(source, node)
        elif changes_its_input(self.gm, node) and isinstance(changed := first_argument(node), Node):
            self._write(changed, node)
            self._join(node, [changed])
            if not is_assignment(node):
                self._stale.pop(changed, None)
                self._replace(changed, node)
        self._stale.pop(node, None)

    def _join(self, node: Node, sources: list[Node]) -> None:
        groups = [self._sharing[source] for source in sources]
        together = groups[0] if groups else set()
        for group in [{node}, self._sharing.get(node, set()), *groups]:
            if group is not together:
                together |= group
                for member in group:
                    self._sharing[member] = together

    def _write(self, changed: Node, write: Node) -> None:
        members = self._sharing[changed]
        members -= {member for member in members if self._last_read[member] < self._place[write]}
        for member in members:
            self._stale[member] = write

    def _replace(self, node: Node, later: Node) -> None:
        self._later[node] = later
        self._last_read[later] = max(self._last_read[later], self._last_read[node])
        self._sharing[node].discard(node)


def _may_share(gm: GraphModule, node: Node) -> list[Node]:
    """The inputs whose memory the result may lie in."""
    if is_unknown_code(gm, node):
        return [source for source in node.all_input_nodes if source.target != TRAINING_MODE]
    if node.op == "call_module":
        return node.all_input_nodes if isinstance(attribute_of(gm, node), _VIEWING_MODULES) else []
    viewing = node.target in _VIEWING or attribute_name(node) in _VIEWING_ATTRIBUTES
    return node.all_input_nodes[:1] if viewing else []
