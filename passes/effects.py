"""In-place writes: what reads a tensor after a write gets a node of its own, so that order becomes data flow.

Later passes may then share, move or prove things of a node's value without asking what happened to its memory meanwhile.
"""

from collections import defaultdict

from torch.fx import GraphModule, Node

from pege_fx.modules.mode import TRAINING_MODE, written
from pege_fx.passes.graph import (
    after,
    call_function,
    changes_its_input,
    first_argument,
    is_assignment,
    reads_size,
    remove_dead_nodes,
    traits_of,
)


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
        for source in _writes(self.gm, node):
            self._write(source, node)
        if changes_its_input(self.gm, node) and isinstance(changed := first_argument(node), Node):
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
    """The inputs whose memory the result may lie in: by the table, and as it did on the example inputs."""
    if reads_size(node):
        return []
    sources = _values_of(node)
    view = traits_of(gm, node).view
    seen = node.meta.get("shares", [])
    return seen if view is False else [*sources[:1], *seen] if view else sources


def _writes(gm: GraphModule, node: Node) -> list[Node]:
    """The inputs to which code that no table knows may write: those that it changed on the example inputs, or else all."""
    if node.op == "output" or not traits_of(gm, node).writes:
        return []
    return list(node.meta.get("writes", _values_of(node)))


def _values_of(node: Node) -> list[Node]:
    """The inputs of a node that may hold tensors."""
    return [source for source in node.all_input_nodes if source.target != TRAINING_MODE and not reads_size(source)]
