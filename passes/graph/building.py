"""Making nodes, changing what they call, putting one in the place of another."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from pege_fx.numerics.recompute import original_of
from pege_fx.passes.graph.arguments import given_to, parameters_of, set_arguments
from pege_fx.passes.graph.attributes import free_path, module_of
from pege_fx.passes.graph.origin import copy_origin
from pege_fx.passes.operators import OUT_OF_PLACE, RECOMPUTING


def become(node: Node, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Turn a ``call_module`` node into a function's call, in place, so that it keeps its name and users."""
    node.meta["path"] = str(node.target)
    node.op, node.target = "call_function", function
    _mark_own(node)
    set_arguments(node, args, kwargs)


def become_call(gm: GraphModule, node: Node, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Turn a function's call into that of a new module, in place, so that it keeps its name and users."""
    path = free_path(gm, path)
    gm.add_submodule(path, module)
    node.op, node.target = "call_module", path
    set_arguments(node, args, {})


def get_attr(graph: Graph, path: str, before: Node, name: str | None = None) -> Node:
    """Insert a ``get_attr`` node."""
    with graph.inserting_before(before):
        return graph.create_node("get_attr", path, name=name)


def call_module(
    graph: Graph, path: str, argument: Node | None, before: Node, name: str | None = None, more: tuple[Any, ...] = ()
) -> Node:
    """Insert a ``call_module`` node with one argument, or with ``more`` behind it."""
    with graph.inserting_before(before):
        return graph.create_node("call_module", path, (argument, *more), name=name)


def call_module_like(
    gm: GraphModule, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], before: Node
) -> Node:
    """Add a module and insert its call, in the place and with the origin of ``before``."""
    path = free_path(gm, path)
    gm.add_submodule(path, module)
    with gm.graph.inserting_before(before):
        made = gm.graph.create_node("call_module", path, args, kwargs)
    copy_origin(before, made)
    return made


def call_function(
    graph: Graph,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: Node,
    name: str | None = None,
) -> Node:
    """Insert a ``call_function`` node."""
    with graph.inserting_before(before):
        node = graph.create_node("call_function", function, args, kwargs, name=name)
    _mark_own(node)
    return node


def _mark_own(node: Node) -> None:
    """Unpickling a graph traces its code: tell fx that a function of this package is to stay one node."""
    if getattr(node.target, "__module__", "").startswith("pege_fx."):
        node.meta["is_wrapped"] = True


def call_method(graph: Graph, method: str, args: tuple[Node, ...], before: Node) -> Node:
    """Insert a ``call_method`` node."""
    with graph.inserting_before(before):
        return graph.create_node("call_method", method, args)


def after(node: Node) -> Node:
    """Return the node to insert before so that the new one comes right behind ``node`` (and behind all inputs)."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def replace(gm: GraphModule, old: Node, new: Node) -> None:
    """Let every user of ``old`` use ``new``, and erase ``old``."""
    old.replace_all_uses_with(new, propagate_meta=False)
    gm.graph.erase_node(old)


def make_out_of_place(gm: GraphModule, node: Node) -> None:
    """Let a node that would overwrite its input (``inplace=True``, ``+=``, ``add_``) leave it alone."""
    node.target = OUT_OF_PLACE.get(node.target, node.target)
    module = module_of(gm, node, nn.Module)
    if module is not None and getattr(module, "inplace", False):
        module.inplace = False  # type: ignore[assignment]
    elif node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
    elif node.op == "call_function" and given_to(node, "inplace"):
        node.update_arg(list(parameters_of(node.target)).index("inplace"), False)


def can_recompute(node: Node) -> bool:
    """Tell whether there is a variant of a node's operation that keeps no fake-quantized operand for backward."""
    return node.target in RECOMPUTING


def recompute_operands(node: Node) -> None:
    """Let a node call that variant, in place."""
    if node.target in RECOMPUTING:
        node.op, node.target = "call_function", RECOMPUTING[node.target]
        _mark_own(node)


def keep_operands(gm: GraphModule) -> None:
    """Undo ``recompute_operands`` everywhere: torch's own functions again."""
    for node in gm.graph.nodes:
        if (original := original_of(node.target)) is not node.target:
            node.target = original
            node.meta.pop("is_wrapped", None)


def replace_by_constant(gm: GraphModule, node: Node, value: bool | int | float) -> None:
    """Let every user of ``node`` take ``value`` instead, and erase ``node``."""
    for user in list(node.users):
        user.args = map_arg(user.args, lambda source: value if source is node else source)
        user.kwargs = map_arg(user.kwargs, lambda source: value if source is node else source)
    gm.graph.erase_node(node)


def write_out(gm: GraphModule, call: Node, inner: Graph, path: Callable[[str], str]) -> None:
    """Put the nodes of ``inner`` in the place of a ``call_module`` node, which becomes the last of them under its own name.

    ``path`` says where in ``gm`` an attribute of ``inner`` lies.
    """
    given, named = iter(call.args), dict(call.kwargs)
    values: dict[Node, Any] = {}
    (result,) = next(node for node in inner.nodes if node.op == "output").args
    call.meta["path"] = str(call.target)
    for node in inner.nodes:
        args, kwargs = (map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
        if node.op == "placeholder":
            values[node] = named.get(str(node.target), next(given, *args[:1] or (None,)))
        elif node is result:
            call.op, call.target = node.op, node.target
            set_arguments(call, args, kwargs)
            return
        elif node.op == "output":
            call.replace_all_uses_with(values[result], propagate_meta=False)
            gm.graph.erase_node(call)
        else:
            target = path(str(node.target)) if node.op == "get_attr" else node.target
            with gm.graph.inserting_before(call):
                values[node] = gm.graph.create_node(node.op, target, args, kwargs, name=f"{call.name}_{node.name}")
            copy_origin(call, values[node])
