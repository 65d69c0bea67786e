"""GraphModules of what was traced, and of what stays Python around its graphs."""

import inspect
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from pege_fx.modules.batch_norm import only_normalizes
from pege_fx.modules.calls import takes_other_arguments
from pege_fx.modules.fixed_attributes import CapturedGraph
from pege_fx.modules.mode import PYTHON_FORWARD, TRAINING_MODE, PythonForward, TrainingMode
from pege_fx.passes.capture.bytecode import names_in_forward
from pege_fx.passes.capture.grafts import Grafted
from pege_fx.passes.capture.load_hooks import keep_load_hooks
from pege_fx.passes.capture.patching import reserve_self, uncompiled
from pege_fx.passes.capture.tracer import PegeTracer
from pege_fx.passes.graph import (
    attribute_of,
    join,
    parent_and_name,
    remove_dead_nodes,
)


def graph_module(root: nn.Module, graph: Graph, tracer: PegeTracer, prefix: str) -> GraphModule:
    if tracer.mode_is_read():
        mode = TrainingMode().train(root.training)
        root.add_module(TRAINING_MODE, mode)  # not before: a Sequential would call it
    if prefix:
        gm: GraphModule = Grafted(root, graph, class_name=type(root).__name__)
    else:  # the passes do not run it, and the runner compiles what they made of it
        with uncompiled():
            gm = CapturedGraph(root, graph, class_name=type(root).__name__)
    gm.meta["prefix"] = prefix
    for node in gm.graph.find_nodes(op="call_module"):
        only_normalizes(attribute_of(gm, node))
    gm.meta["is_operation"] = PegeTracer().is_leaf_module(root, prefix)
    remove_dead_nodes(gm)
    keep_everything(root, gm)
    keep_load_hooks(root, gm)
    return gm


def keep_everything(root: nn.Module, gm: GraphModule) -> None:
    """Give the GraphModule what the graph does not use too, so that float checkpoints load key by key."""
    present = dict(gm.named_modules(remove_duplicate=False))
    for path, module in root.named_modules(remove_duplicate=False):
        if path not in present:
            parent, name = parent_and_name(path)
            present[parent].add_module(name, module)
            present |= {join(path, inner): child for inner, child in module.named_modules(remove_duplicate=False)}
        kept = present[path]
        if kept is module:
            continue
        kept.training = module.training
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not hasattr(kept, name):
                kept.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if not hasattr(kept, name):
                kept.register_buffer(name, buffer, persistent=name in module.state_dict())


def stays_python(gm: GraphModule) -> bool:
    """Tell whether a graph only calls its root's own code."""
    return bool(gm.graph.find_nodes(op="call_module", target=PYTHON_FORWARD))


def _any_call(*args: Any, **kwargs: Any) -> None:
    """The signature of a call whose arguments nobody knows."""


def python_root(root: nn.Module, prefix: str) -> GraphModule:
    """A graph that calls the root's own code: its parameters and children are the graph's, under their own names."""
    graph = Graph()
    reserve_self(graph)
    arguments: dict[str, Node] = {}
    extra: Any = ()
    more: Any = {}
    called = _any_call if takes_other_arguments(root) else root.forward
    for name, parameter in inspect.signature(called).parameters.items():
        default = parameter.default
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        node = graph.create_node("placeholder", f"{stars}{name}", () if default is parameter.empty else (default,), name=name)
        if stars == "*":
            extra = node
        elif stars == "**":
            more = node
        else:
            arguments[name] = node
    kinds = (root._modules, root._parameters, root._buffers)
    parts = {name: part for kind in kinds for name, part in kind.items() if part is not None}  # one may have two names
    owned = {name: graph.create_node("get_attr", name) for name in parts}
    result = graph.create_node("call_module", PYTHON_FORWARD, (owned, arguments, extra, more))
    graph.output(result)
    holder = nn.Module()
    holder.training = root.training
    persistent = set(root.state_dict())
    for name, part in parts.items():
        if isinstance(part, nn.Module) or name not in root._buffers:
            setattr(holder, name, part)
        else:
            holder.register_buffer(name, part, persistent=name in persistent)
    assigned = root._buffers.keys() & parts & names_in_forward(root).written
    holder.add_module(PYTHON_FORWARD, PythonForward(root, assigned).train(root.training))
    gm = (Grafted if prefix else CapturedGraph)(holder, graph, class_name=type(root).__name__)
    gm.meta["prefix"] = prefix
    keep_load_hooks(root, gm)
    return gm
