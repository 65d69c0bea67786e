"""Which attributes of a model are constants of its graphs: what ``forward`` reads of modules whose code runs no more."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import GraphModule

from pege_fx.modules.fixed_attributes import Fixed, shown
from pege_fx.modules.mode import PYTHON_FORWARD
from pege_fx.passes.capture.bytecode import names_in_forward
from pege_fx.passes.graph import attribute_of

_CONSTANTS = (type(None), bool, int, float, str, tuple)


def fixed_attributes(model: nn.Module, gm: GraphModule) -> Fixed:
    """Return the plain attributes of a model that its graph holds as constants, by module path and name.

    Layers of torch are taken to read all of theirs; of other classes those count that the compiled code of any forward names.
    Modules that still run, because they stay Python or are called by the graph, have none.
    """
    running = set(_running(gm))
    classes = {type(module): module for module in model.modules() if not _is_of_torch(module)}
    read: set[str] = set()
    for module in classes.values():
        code = names_in_forward(module)
        read |= code.read | (code.texts if "getattr" in code.variables else frozenset())
    found: dict[str, dict[str, str]] = {}
    present = dict(gm.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        there = present.get(path)
        if there is None or there in running or isinstance(module, torch.jit.ScriptModule):
            continue
        values = _plain_attributes(module)
        names = values.keys() if _is_of_torch(module) else values.keys() & read
        live = there._parameters.keys() | there._buffers.keys() | there._modules.keys()
        if fixed := {name: shown(values[name]) for name in sorted(names) if name not in live}:
            found[path] = fixed
    return found


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    """The attributes of a module that are no modules, parameters or buffers, with the constants of its class."""
    values: dict[str, object] = {}
    for cls in reversed(type(module).__mro__):
        if not cls.__module__.startswith("torch.") and cls is not object:
            values |= {name: value for name, value in vars(cls).items() if isinstance(value, _CONSTANTS)}
    values |= vars(module)
    own = _OF_MODULES | {"forward"}
    return {name: value for name, value in values.items() if name not in own and not name.startswith("__")}


_OF_MODULES = set(vars(nn.Module())) | set(dir(nn.Module))


def _running(gm: GraphModule) -> Iterator[nn.Module]:
    """The modules whose own code runs in a call: those that graphs call, and what code in Python between graphs has."""
    for graph in gm.modules():
        if not isinstance(graph, GraphModule):
            continue
        for node in graph.graph.find_nodes(op="call_module"):
            if node.target == PYTHON_FORWARD:
                for child in graph.children():
                    yield from _below(child)
            elif isinstance(called := attribute_of(graph, node), nn.Module):
                yield from _below(called)


def _below(module: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(module, GraphModule):
        yield module
        for child in module.children():
            yield from _below(child)
