"""What ``forward`` leaves in its modules while it is traced: attributes, buffers, hidden states. All of it is put back."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy

from pege_fx.modules.mode import Attributes, attributes, put_back
from pege_fx.modules.write_watch import WriteWatch
from pege_fx.passes.graph import after, call_method, copy_origin, get_attr

_CONSTANTS = ("_tensor_constant", "_torchbind_obj", "_tree_spec_constant", "_opaque_obj")  # what fx keeps on the root


class ModuleState:
    """The attributes of a model's modules, as they are when it is made.

    Args:
        root: the model.
        opaque: paths of modules that are not looked into, and keep what is theirs.

    While example values are computed, ``watch`` is to be on: it notes what a parameter held that they write.

    ``changed`` are the attributes, (module, name), in which ``forward`` left other numbers and texts than it found, ``kept``
    those in which it left tensors.
    """

    def __init__(self, root: nn.Module, opaque: Collection[str] = ()) -> None:
        self.root = root
        self.changed: list[tuple[str, str]] = []
        self.kept: list[tuple[str, str]] = []
        self._before = [(path, module, attributes(module)) for path, module in root.named_modules()]
        self._opaque = opaque
        self.watch = WriteWatch(parameter for parameter in root.parameters() if not parameter.is_meta)
        self._left: list[tuple[nn.Module, Attributes]] = []

    def note(self) -> None:
        """Note what ``forward`` left, in ``changed`` and ``kept``."""
        for path, module, before in self._followed():
            for name, new in vars(module).items():
                if (old := before.values.get(name)) is new or name == "training":
                    continue
                if isinstance(new, (Proxy, Tensor)):
                    self.kept.append((path, name))
                elif isinstance(new, (bool, int, float, str)) and (type(new) is not type(old) or new != old):
                    self.changed.append((path, name))
            for name, new in module._buffers.items():
                if isinstance(new, Tensor) and new is not before.copies["_buffers"].get(name):
                    self.kept.append((path, name))
        if self.changed:
            self._left = [(module, _without_proxies(attributes(module), before)) for _, module, before in self._before]

    def assigned_buffers(self) -> Iterator[tuple[str, str, Tensor, Node]]:
        """Yield the buffers to which ``forward`` assigned a value of the graph: module, name, what they held, the value."""
        for path, module, before in self._followed():
            for name, old in before.copies["_buffers"].items():
                new: Any = module._buffers.get(name)
                if isinstance(new, Proxy) and isinstance(old, Tensor):
                    yield path, name, old, new.node

    def _followed(self) -> Iterator[tuple[str, nn.Module, Attributes]]:
        for path, module, before in self._before:
            if not any(path == opaque or path.startswith(f"{opaque}.") for opaque in self._opaque):
                yield path, module, before

    def put_back(self) -> None:
        """Give the modules the attributes that they had, and the root what fx keeps there."""
        constants = {name: value for name, value in vars(self.root).items() if name.startswith(_CONSTANTS)}
        for _, module, before in self._before:
            put_back(module, before)
        self.watch.put_back()
        self.root.__dict__.update(constants)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Within, the modules have what ``forward`` left in them, where it ``changed`` anything."""
        now = [(module, attributes(module)) for module in self.root.modules()]
        try:
            for module, left in self._left:
                put_back(module, left)
            yield
        finally:
            for module, before in now:
                put_back(module, before)


def _without_proxies(left: Attributes, before: Attributes) -> Attributes:
    """What ``forward`` left, without what is no value but a node of a graph that is done."""
    values = {name: before.values.get(name) if isinstance(value, Proxy) else value for name, value in left.values.items()}
    values = {name: value for name, value in values.items() if not name.startswith(_CONSTANTS)}
    copies = left.copies.copy()
    for name, value in left.copies.items():
        if any(isinstance(part, Proxy) for part in (value.values() if isinstance(value, dict) else value)):
            copies[name] = before.copies.get(name, type(value)())
    return Attributes(values, copies)


def write_buffer(graph: Graph, target: str, value: Node) -> None:
    """Write a value into a buffer at the end of a graph, which goes on reading what the buffer held."""
    for read in graph.find_nodes(op="get_attr", target=target):
        readers = list(read.users)
        held = call_method(graph, "clone", (read,), after(read))  # backward may need it
        copy_origin(read, held)
        for reader in readers:
            reader.replace_input_with(read, held)
    output = graph.output_node()
    call_method(graph, "copy_", (get_attr(graph, target, output), value), output)
