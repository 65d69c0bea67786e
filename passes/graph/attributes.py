"""What a graph's nodes name: modules, parameters, buffers, and their paths."""

import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.modules.calls import beside_forward

M = TypeVar("M", bound=nn.Module)


def module_of(gm: GraphModule, node: Any, cls: type[M]) -> M | None:
    """Return the module that a ``call_module`` node calls if it is a ``cls``, else None."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    module = look_up(gm, str(node.target))
    return module if isinstance(module, cls) else None


def look_up(root: nn.Module, path: str) -> Any:
    """Return what a dotted path names; ``nn.Module.__getattr__`` is left out where it can be, at a fifth of the time."""
    *around, name = path.split(".")
    holder: Any = root
    try:
        for step in around:
            holder = holder._modules[step]
        found = holder._modules.get(name)
        if found is None:
            found = holder._parameters.get(name)
    except (AttributeError, KeyError):  # something that is no module lies on the way
        return operator.attrgetter(path)(root)
    return getattr(holder, name) if found is None else found


def calls(gm: GraphModule, cls: type[M]) -> Iterator[tuple[Node, M]]:
    """Yield every ``call_module`` node of a class with its module; nodes may be changed meanwhile."""
    for node in list(gm.graph.nodes):
        if (module := module_of(gm, node, cls)) is not None:
            yield node, module


def call_sites(gm: GraphModule) -> Counter[nn.Module]:
    """Count the nodes that call each module, under whichever of its names."""
    return Counter(module for _, module in calls(gm, nn.Module))


def uses(graphs: Iterable[GraphModule]) -> Counter[int]:
    """Count the nodes that call or read each module and tensor (by ``id``), alone or as a part of a module."""
    counts: Counter[int] = Counter()
    for gm in graphs:
        for node in gm.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                counts.update(_parts(attribute_of(gm, node)))
    return counts


def _parts(value: Any) -> set[int]:
    """What a node uses: a graph inside a module speaks for itself."""
    found = {id(value)}
    if isinstance(value, nn.Module) and not isinstance(value, GraphModule):
        found.update(map(id, (*value._parameters.values(), *value._buffers.values())))
        found.update(*map(_parts, value.children()))
    return found


def attribute(gm: GraphModule, node: Any) -> Any:
    """Return the value of a ``get_attr`` node, or None for any other."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    return look_up(gm, str(node.target))


def attribute_of(gm: nn.Module, node: Node) -> Any:
    """Return the module or tensor that a ``call_module`` or ``get_attr`` node names."""
    return look_up(gm, str(node.target))


def tensor_of(gm: GraphModule, node: Any) -> Tensor | None:
    """Return the tensor that a ``get_attr`` node reads, or None."""
    value = attribute(gm, node)
    return value if isinstance(value, Tensor) else None


def has_attribute(module: nn.Module, path: str) -> bool:
    """Tell whether a dotted path names anything under a module."""
    try:
        look_up(module, path)
    except AttributeError:
        return False
    return True


def free_path(gm: GraphModule, path: str) -> str:
    """Return ``path``, with a number behind it if something of that name is there already."""
    candidate, number = path, 0
    while has_attribute(gm, candidate):
        number += 1
        candidate = f"{path}_{number}"
    return candidate


def join(*parts: str) -> str:
    """Join parts of a dotted path, leaving out empty ones."""
    return ".".join(part for part in parts if part)


def parent_and_name(path: str) -> tuple[str, str]:
    """Split a dotted path into its parent and its last name."""
    parent, _, name = path.rpartition(".")
    return parent, name


def register_buffer(gm: GraphModule, path: str, value: Tensor) -> None:
    """Store a tensor as a buffer at a dotted path, making plain modules on the way where none are."""
    parent, name = _made_parent(gm, path)
    parent.register_buffer(name, value)


def set_parameter(gm: GraphModule, path: str, value: nn.Parameter) -> None:
    """Store a parameter at a dotted path, making plain modules on the way where none are."""
    parent, name = _made_parent(gm, path)
    parent.register_parameter(name, value)


def _made_parent(gm: GraphModule, path: str) -> tuple[nn.Module, str]:
    parent, name = parent_and_name(path)
    if parent and not has_attribute(gm, parent):
        gm.add_submodule(parent, nn.Module())
    return gm.get_submodule(parent), name


def has_parameters(module: nn.Module) -> bool:
    """Tell whether a module or any part of it has a parameter."""
    return next(module.parameters(), None) is not None


def is_torch_module(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's own layers, without children or hooks."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    return own and not beside_forward(module) and not list(module.children())
