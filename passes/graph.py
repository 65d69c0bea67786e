"""Reading and writing fx graphs: the only file that looks at ``node.args``, with helpers of exact types."""

import dataclasses
import functools
import inspect
import operator
import sys
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg

from pege_fx.decompositions.recurrent import recurrent
from pege_fx.modules.batch_norm import BiasFold, BiasFoldBehind, Fold, WeightFold
from pege_fx.modules.calls import beside_forward
from pege_fx.modules.mode import PythonForward, TrainingMode
from pege_fx.numerics.recompute import REMAKING
from pege_fx.numerics.spec import Channels
from pege_fx.passes.op_traits import may_write

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Operator:
    """A function with edges that can be quantized.

    ``parameters`` are its leading parameters by name; ``weights`` and ``inputs`` say which of them, or of its keywords,
    are edges. The builtin functions have no signature to ask, so the table below is their signature. With ``on_request``, only
    a rule that names the function quantizes it; all its tensors are inputs then, parameters too.
    """

    name: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    transposed: bool = False
    on_request: bool = False


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def _conv(name: str, transposed: bool = False) -> Operator:
    return Operator(name, _CONV_TRANSPOSE if transposed else _CONV, ("input",), ("weight",), transposed)


LINEAR = Operator("linear", ("input", "weight", "bias"), ("input",), ("weight",))
EMBEDDING = Operator(
    "embedding",
    ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    (),
    ("weight",),
)
EMBEDDING_BAG = Operator("embedding_bag", ("input", "weight", "offsets"), (), ("weight",))
BILINEAR = Operator("bilinear", ("input1", "input2", "weight", "bias"), ("input1", "input2"), ("weight",))
MATMUL = Operator("matmul", ("input", "other"), ("input", "other"))
MM = Operator("mm", ("input", "mat2"), ("input", "mat2"))
BMM = Operator("bmm", ("input", "mat2"), ("input", "mat2"))
ADDMM = Operator("addmm", ("input", "mat1", "mat2"), ("mat1", "mat2"))
BADDBMM = Operator("baddbmm", ("input", "batch1", "batch2"), ("batch1", "batch2"))
GROUPED_MM = Operator("grouped_mm", ("mat_a", "mat_b"), ("mat_a", "mat_b"))
EINSUM = Operator("einsum", ("equation", "a", "b", "c", "d"), ("a", "b", "c", "d"))
ATTENTION = Operator("scaled_dot_product_attention", ("query", "key", "value", "attn_mask"), ("query", "key", "value"))

FUNCTIONS: dict[Any, Operator] = {
    F.conv1d: _conv("conv1d"),
    F.conv2d: _conv("conv2d"),
    F.conv3d: _conv("conv3d"),
    F.conv_transpose1d: _conv("conv_transpose1d", True),
    F.conv_transpose2d: _conv("conv_transpose2d", True),
    F.conv_transpose3d: _conv("conv_transpose3d", True),
    F.linear: LINEAR,
    F.embedding: EMBEDDING,
    torch.matmul: MATMUL,
    operator.matmul: MATMUL,
    F.embedding_bag: EMBEDDING_BAG,
    F.bilinear: BILINEAR,
    torch.mm: MM,
    torch.bmm: BMM,
    torch.addmm: ADDMM,
    torch.baddbmm: BADDBMM,
    F.grouped_mm: GROUPED_MM,
    torch.einsum: EINSUM,
    F.scaled_dot_product_attention: ATTENTION,
}
FUNCTIONS |= {remaking: FUNCTIONS[function] for function, remaking in REMAKING.items() if function in FUNCTIONS}
_EINSUMS = {function for function, found in FUNCTIONS.items() if found is EINSUM}
METHODS: dict[str, Operator] = {
    "matmul": MATMUL,
    "__matmul__": MATMUL,
    "mm": MM,
    "bmm": BMM,
    "addmm": ADDMM,
    "baddbmm": BADDBMM,
}


def _elementwise(name: str) -> Operator:
    return Operator(name, ("input", "other"), ("input", "other"), on_request=True)


def _of_list(name: str) -> Operator:
    return Operator(name, ("tensors", "dim"), ("tensors",), on_request=True)


ADD, SUB, MUL, CAT, STACK = (_elementwise("add"), _elementwise("sub"), _elementwise("mul"), _of_list("cat"), _of_list("stack"))
JOINING_FUNCTIONS: dict[Any, Operator] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), ADD),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract), SUB),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), MUL),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), CAT),
    torch.stack: STACK,
}
JOINING_FUNCTIONS[REMAKING[torch.mul]] = MUL
JOINING_METHODS: dict[str, Operator] = {
    **dict.fromkeys(("add", "add_"), ADD),
    **dict.fromkeys(("sub", "sub_", "subtract", "subtract_"), SUB),
    **dict.fromkeys(("mul", "mul_", "multiply", "multiply_"), MUL),
}


def joining_of(node: Node) -> Operator | None:
    """Return the entry of a node that joins tensors, element by element or side by side; None for any other.

    The operands of a list are its items, as ``"tensors[0]"``; a list that another node makes has none.
    """
    table: Mapping[Any, Operator] = JOINING_METHODS if node.op == "call_method" else JOINING_FUNCTIONS
    found = table.get(node.target)
    if found is None or "out" in node.kwargs:
        return None
    if found.inputs != ("tensors",):
        return found
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    count = len(tensors) if isinstance(tensors, (list, tuple)) else 0
    return dataclasses.replace(found, inputs=tuple(f"tensors[{i}]" for i in range(count)))


@functools.cache
def aliases_of(name: str) -> frozenset[str]:
    """Return the names of the functions and methods that are the operation of this name."""
    functions = [f.__name__ for f, found in (FUNCTIONS | JOINING_FUNCTIONS).items() if found.name == name]
    return frozenset(functions + [method for method, found in (METHODS | JOINING_METHODS).items() if found.name == name])


def operator_of(node: Node) -> Operator | None:
    """Return the table's entry for a node, or None if none of its edges can be quantized."""
    if node.op == "call_function":
        if node.target in _EINSUMS and isinstance(equation := first_argument(node), str) and "," not in equation:
            return None  # of one tensor: a transpose, a diagonal, a sum; it may be a view
        return _recurrent(node) if node.target is recurrent else FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    return None


def _recurrent(node: Node) -> Operator:
    weights = tuple(name for name in node.kwargs if name.startswith("weight_"))
    return Operator(str(node.kwargs["kind"]), ("input", "hx"), ("input",), weights)


def entry_of(node: Node) -> Operator:
    """Return the table's entry of an operator's node, also of one that joins."""
    found = operator_of(node) or joining_of(node)
    assert found is not None, f"{node} is no operator"
    return found


def operand(node: Node, name: str) -> Any:
    """Return the argument that an operator's node passes for a parameter, or None if it passes none."""
    name, index = _item(name)
    position = _position(entry_of(node), name)
    value: Any = node.args[position] if position < len(node.args) else node.kwargs.get(name)
    return value if index is None else value[index]


@functools.cache
def _item(name: str) -> tuple[str, int | None]:
    """Split ``"tensors[1]"`` into the parameter and the place in its list."""
    name, bracket, index = name.rstrip("]").partition("[")
    return name, int(index) if bracket else None


def _position(described: Operator, name: str) -> int:
    """Where a parameter stands among the positional ones; keywords stand behind all."""
    return described.parameters.index(name) if name in described.parameters else sys.maxsize


def set_operand(node: Node, name: str, value: Node | None) -> None:
    """Pass ``value`` for a parameter of an operator's node."""
    name, index = _item(name)
    given: Any = value
    if index is not None:
        items = operand(node, name)
        given = [*items[:index], value, *items[index + 1 :]]
    position = _position(entry_of(node), name)
    if position < len(node.args):
        node.update_arg(position, given)
    else:
        node.update_kwarg(name, given)


def first_argument(node: Node) -> Any:
    """Return the first positional argument of any node, or None."""
    return node.args[0] if node.args else None


def arguments(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a node's positional and keyword arguments."""
    return node.args, dict(node.kwargs)


def set_arguments(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give a node new arguments."""
    node.args, node.kwargs = args, kwargs


def map_nodes(value: Any, function: Callable[[Node], Any]) -> Any:
    """Return a node's arguments, or a part of them, with every node replaced by what the function returns for it."""
    return map_arg(value, function)


def plain(value: Any) -> Any:
    """Return arguments with ordinary lists and dicts in the place of a node's immutable ones: a function may change them."""
    if isinstance(value, immutable_list):
        return [plain(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: plain(item) for key, item in value.items()}
    return tuple(map(plain, value)) if type(value) is tuple else value


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


def channels_of(node: Node, name: str, weight: Tensor) -> Channels | None:
    """Return where an operand of an operator keeps its output channels; None: no axis of it is one.

    Of a weight that is transposed on the way, the axis is that of the weight. Experts' matrices have one channel each.
    """
    described = operator_of(node)
    assert described is not None, f"{node} is no operator"
    if described is GROUPED_MM and weight.ndim == 3:
        return Channels(weight.shape[0])
    if weight.ndim == 2 and _is_turned(operand(node, name)):
        found = _channels_of(node, described, name, weight.mT)
        return None if found is None else dataclasses.replace(found, axis=1 - found.axis)
    return _channels_of(node, described, name, weight)


def _channels_of(node: Node, described: Operator, name: str, weight: Tensor) -> Channels | None:
    if name in described.weights:
        if not described.transposed:
            return Channels(weight.shape[0])
        groups = operand(node, "groups") or 1
        return Channels(weight.shape[1] * groups, axis=1, groups=groups)
    if weight.ndim != 2 or described is EINSUM or len(described.inputs) != 2:
        return None
    is_left = name == described.inputs[0]  # rows of the left factor, columns of the right one
    return Channels(weight.shape[0]) if is_left else Channels(weight.shape[1], axis=1)


def input_channels_of(node: Node, weight: Tensor) -> Channels:
    """Return where the weight of a convolution (not a transposed one) or of a linear layer keeps its input channels."""
    groups = operand(node, "groups") or 1
    return Channels(weight.shape[1] * groups, axis=1, groups=groups)


def pads(node: Node, weight: Tensor) -> bool:
    """Tell whether a convolution or linear layer adds anything to its input."""
    padding = operand(node, "padding")
    if padding == "same":
        return any(size > 1 for size in weight.shape[2:])
    return padding not in (None, "valid") and any(
        side != 0 for side in (padding if isinstance(padding, (tuple, list)) else (padding,))
    )


# --- modules and attributes ----------------------------------------------------------------------------------


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


def is_leaf_function(node: Node) -> bool:
    """Tell whether a node is somebody's own function, kept whole by ``torch.fx.wrap``."""
    own = getattr(node.target, "__module__", None) or ""
    library = own.partition(".")[0] in ("torch", "pege_fx", "einops")
    return node.op == "call_function" and type(node.target) is types.FunctionType and not library


def is_unknown_code(root: nn.Module, node: Node) -> bool:
    """Tell whether a node calls code that the graph does not look into: it may write to its inputs, or have other effects."""
    if node.op == "call_method":
        return not hasattr(Tensor, str(node.target))  # of an object such as a cache
    if node.op != "call_module":
        return is_leaf_function(node)
    own = type(attribute_of(root, node))
    return not own.__module__.startswith(("torch.nn.", "pege_fx.")) or own is PythonForward


def hides_weights(root: nn.Module, node: Node) -> bool:
    """Tell whether a node is such a function and gets a weight."""
    if not is_leaf_function(node):
        return False
    read = [source for source in node.all_input_nodes if source.op == "get_attr"]
    return any(is_matrix(operator.attrgetter(str(source.target))(root)) for source in read)


def is_matrix(value: Any) -> bool:
    """Tell whether a value is a parameter with two dimensions or more: a weight, and no bias or scale."""
    return isinstance(value, nn.Parameter) and value.ndim > 1


_TRANSPOSING: set[Any] = {torch.transpose, torch.swapaxes, torch.t, "transpose", "swapaxes", "t"}


def is_transpose(node: Any) -> bool:
    """Tell whether a node exchanges two dimensions of a tensor."""
    return isinstance(node, Node) and (node.target in _TRANSPOSING or attribute_name(node) in ("T", "mT"))


def behind_transposes(node: Any) -> Any:
    """Return what a node is a transpose of, or the node itself."""
    while is_transpose(node):
        node = node.args[0] if node.args else None
    return node


def _is_turned(node: Any) -> bool:
    """Whether transposes of a matrix exchange its dimensions in the end."""
    count = 0
    while is_transpose(node):
        node, count = node.args[0] if node.args else None, count + 1
    return count % 2 == 1


def remove_unread_transposes(node: Node) -> None:
    """Erase a node and the transposes before it, as far as nobody reads them."""
    while is_transpose(node) and not node.users:
        unread, node = node, node.args[0]  # type: ignore[assignment]
        node.graph.erase_node(unread)


def _exchanges_rows_and_columns(node: Node, value: Tensor) -> bool:
    """Whether transposes of a parameter exchange its last two dimensions and no others: then it is a weight all the same."""
    if not is_matrix(value) or value.ndim > 3:
        return False
    while is_transpose(node):
        if attribute_name(node) != "mT" and value.ndim == 3:
            dims = [dim % 3 if isinstance(dim, int) else -1 for dim in node.args[1:]]
            if sorted(dims) != [1, 2]:
                return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def transposed_again(node: Node, source: Node, placed: Node, before: Node) -> Node:
    """Return ``placed`` with the transposes that lead from ``source`` to ``node``; of their own, if there are any."""
    if node is source:
        return placed
    inner = transposed_again(node.args[0], source, placed, before)  # type: ignore[arg-type]
    graph = node.graph
    with graph.inserting_before(before):
        return graph.node_copy(node, lambda argument: inner if argument is node.args[0] else argument)


def is_weight(gm: GraphModule, node: Node, name: str, source: Any) -> bool:
    """Tell whether an operand reads a weight: what the operator calls so, or a parameter that is a factor of a product."""
    described = entry_of(node)
    value = tensor_of(gm, behind_transposes(source))
    if value is None or described.on_request:
        return False
    if is_transpose(source) and not _exchanges_rows_and_columns(source, value):
        return False
    return name in described.weights or is_matrix(value)


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


# --- what earlier passes noted --------------------------------------------------------------------------------


def rank_of(node: Any) -> int | None:
    """Return the number of dimensions that is known of a node's value, or None."""
    return node.meta.get("rank") if isinstance(node, Node) else None


def unfolded(gm: GraphModule, node: Any) -> Any:
    """Return what a weight or bias reads before its BatchNorm is folded in."""
    fold = module_of(gm, node, nn.Module)
    return first_argument(node) if isinstance(fold, (WeightFold, BiasFold)) else node


def result_of(gm: GraphModule, node: Node) -> Node:
    """Return the node that has an operation's result: the BatchNorm behind it that is folded into it, or itself."""
    folded = module_of(gm, operand(node, "bias"), BiasFold)
    if folded is None or isinstance(folded, BiasFoldBehind):
        return node
    while module_of(gm, node, nn.Module) is not folded.fold.bn:
        (node,) = node.users
    return node


def folded_weights(gm: GraphModule) -> dict[Node, Fold]:
    """Return the nodes of weights (not fake-quantized) that are folded in evaluation."""
    return {node: module.fold for node, module in calls(gm, WeightFold)}


# --- where a node comes from ---------------------------------------------------------------------------------


def owner(node: Node) -> str:
    """Return the path of the innermost module whose ``forward`` made the node; "" is the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = next(reversed(stack.values()))
    return str(path)


def owner_class(node: Node) -> str:
    """Return the class name of that module, "" for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    _, cls = next(reversed(stack.values()))
    return str(getattr(cls, "__name__", cls)).rpartition(".")[2]


def scope(node: Node) -> str:
    """Return the path of the module that a node's value belongs to: for a module's result, the module around it."""
    path = str(node.target) if node.op == "call_module" else node.meta.get("path")
    return owner(node) if path is None else parent_and_name(path)[0]


def short_name(node: Node) -> str:
    """Return a node's name without the scope it belongs to."""
    prefix = scope(node).replace(".", "_")
    if not prefix:
        return node.name
    lead = f"_{prefix}_" if prefix[0].isdigit() else f"{prefix}_"  # a name begins with no digit
    return node.name.removeprefix(lead)


def copy_origin(source: Node, target: Node) -> None:
    """Make ``target`` come from where ``source`` comes from."""
    for key in ("nn_module_stack", "stack_trace", "path"):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def function_name(node: Node) -> str:
    """Return a short name of what a node does: the table's name, or its function's, method's or module path's."""
    described = operator_of(node)
    if described is not None:
        return described.name
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target)


def where(node: Node) -> str:
    """Return " (file:line)" of the model's code that made a node, or "" if it is not known."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    file, line = lines[-1].removeprefix("File ").split(",")[:2]
    return f" ({file.strip(chr(34))}:{line.strip().removeprefix('line ')})"


# --- building ------------------------------------------------------------------------------------------------


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


_OUT_OF_PLACE: dict[Any, Any] = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}


def make_out_of_place(gm: GraphModule, node: Node) -> None:
    """Let a node that would overwrite its input (``inplace=True``, ``+=``, ``add_``) leave it alone."""
    if node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
    elif node.op == "call_method" and node.target in JOINING_METHODS:
        node.target = str(node.target).removesuffix("_")
    module = module_of(gm, node, nn.Module)
    if module is not None and getattr(module, "inplace", False):
        module.inplace = False  # type: ignore[assignment]
    elif node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
    elif node.op == "call_function" and _given(node, "inplace"):
        node.update_arg(_positions(node.target)["inplace"], False)


# --- what backward makes again --------------------------------------------------------------------------------


def can_remake(node: Node) -> bool:
    """Tell whether there is a variant of a node's operation that keeps no fake-quantized operand for backward."""
    return _remaking_of(node) is not None


def remake_operands(node: Node) -> None:
    """Let a node call that variant, in place."""
    if node.target not in _ORIGINALS and (variant := _remaking_of(node)) is not None:
        node.op, node.target = "call_function", variant
        _mark_own(node)


def keep_operands(gm: GraphModule) -> None:
    """Undo ``remake_operands`` everywhere: torch's own functions again."""
    for node in gm.graph.nodes:
        if node.target in _ORIGINALS:
            node.target = _ORIGINALS[node.target]
            node.meta.pop("is_wrapped", None)


_ORIGINALS: dict[Any, Any] = {variant: variant.__wrapped__ for variant in REMAKING.values()}  # type: ignore[attr-defined]
_REMAKING_METHODS = {
    "matmul": torch.matmul,
    "__matmul__": torch.matmul,
    "mm": torch.mm,
    "bmm": torch.bmm,
    "addmm": torch.addmm,
    "baddbmm": torch.baddbmm,
    "mul": torch.mul,
    "multiply": torch.mul,
}


def _remaking_of(node: Node) -> Callable[..., Any] | None:
    function = _REMAKING_METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    return REMAKING.get(function)


# --- what training drops -------------------------------------------------------------------------------------

_DROPS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def dropout_of(node: Node) -> tuple[Any, Any] | None:
    """Return a functional dropout's probability and what its ``training`` reads (True, False or a node), else None."""
    if node.op != "call_function" or node.target not in _DROPS:
        return None
    named = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    return named.get("p", 0.5), named.get("training", named.get("train", True))


def only_drops(gm: GraphModule, node: Node) -> tuple[nn.Module, ...] | None:
    """Return the modules in whose training mode a node drops something; in evaluation it is the identity. None: it is not.

    An identity drops nothing in any mode, nor does a dropout of nothing.
    """
    module = module_of(gm, node, nn.Module)
    if module is not None:
        if not is_torch_module(module) or not isinstance(module, (nn.Identity, *_DROPOUTS)):
            return None
        return (module,) if getattr(module, "p", 0) != 0 else ()
    if (dropout := dropout_of(node)) is None:
        return None
    probability, training = dropout
    if probability == 0 or training is False:
        return ()
    mode = module_of(gm, training, TrainingMode)
    return None if mode is None else (mode,)


# --- effects -------------------------------------------------------------------------------------------------

_IN_PLACE_OPERATORS = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and name != "inv"} - {
    operator.index,
    operator.indexOf,
    operator.invert,
    operator.is_,
    operator.is_not,
    operator.itemgetter,
}


def attribute_name(node: Node) -> str | None:
    """Return the name of the attribute that a node reads of a value (``x.shape``), or None."""
    return str(node.args[1]) if node.target is getattr else None


_READING_SIZES: set[Any] = {
    "shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad", "size", "dim", "numel", "nelement", "stride",
    "ndimension", "is_contiguous", "is_floating_point", "is_complex", "get_device", "element_size", "itemsize", "names",
    "is_sparse", "is_nested", "is_quantized", "storage_offset", torch.numel, torch.is_floating_point, torch.is_complex, len,
}  # fmt: skip


def reads_size(node: Node) -> bool:
    """Tell whether a node asks a tensor for its shape, type or place, and not for what it holds."""
    return (attribute_name(node) or node.target) in _READING_SIZES


def size_class(node: Node) -> type | None:
    """The class of a shape or of a number in it, None for what may be anything else."""
    if attribute_name(node) == "shape" or node.target == "size":
        return torch.Size if len(node.args) == 1 or node.target is getattr else int
    if node.target is operator.getitem and isinstance(node.args[0], Node) and size_class(node.args[0]) is torch.Size:
        return torch.Size if isinstance(node.args[1], slice) else int
    return None


def is_assignment(node: Node) -> bool:
    """Tell whether a node is ``x[...] = value``."""
    return node.target in (operator.setitem, "__setitem__")


def changes_its_input(root: nn.Module, node: Node) -> bool:
    """Tell whether a node works in place, so that it matters even if nobody uses its result."""
    if node.op == "call_module":
        return bool(getattr(attribute_of(root, node), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    ends_in_place = name.endswith("_") and not name.endswith("__")
    by_operator = node.target in _IN_PLACE_OPERATORS or is_assignment(node)
    return ends_in_place or by_operator or bool(_given(node, "inplace")) or node.kwargs.get("out") is not None


def _given(node: Node, name: str) -> Any:
    """What a function's call passes for a parameter, by position or by keyword; None if nothing."""
    position = _positions(node.target).get(name, len(node.args)) if node.op == "call_function" else len(node.args)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


@functools.cache
def _positions(function: Any) -> dict[str, int]:
    """Where the parameters of a function stand; none of one without a signature."""
    try:
        return {name: position for position, name in enumerate(inspect.signature(function).parameters)}
    except (TypeError, ValueError):
        return {}


_PLACE_OF_MEAN: dict[Any, int] = {F.batch_norm: 1, F.instance_norm: 1, torch.batch_norm: 3, torch.instance_norm: 3}


def keeps_statistics(root: nn.Module, node: Node) -> bool:
    """Tell whether a node is a norm that moves running statistics in training, so that it matters without users."""
    if node.op == "call_module":
        return isinstance(getattr(attribute_of(root, node), "running_mean", None), Tensor)
    place = _PLACE_OF_MEAN.get(node.target, len(node.args))
    return node.kwargs.get("running_mean", dict(enumerate(node.args)).get(place)) is not None


def works_in_place_between(gm: GraphModule, first: Node, last: Node) -> bool:
    """Tell whether any node behind ``first`` and before ``last`` changes its input."""
    node = first.next
    while node is not last:
        if changes_its_input(gm, node):
            return True
        node = node.next
    return False


def remove_dead_nodes(gm: GraphModule, pure: Collection[Node] = ()) -> None:
    """Erase nodes whose result nobody uses, except those that work in place, move statistics, or call code out of sight.

    ``pure``: nodes that move or call such things to no effect but their result; they go as others do.
    """

    for node in reversed(gm.graph.nodes):  # as Graph.eliminate_dead_code, which lints, too
        if node.users or node.op in ("placeholder", "output") or node.is_impure() or changes_its_input(gm, node):
            continue
        if node in pure or not (is_unknown_code(gm, node) or keeps_statistics(gm, node) or may_write(gm, node)):
            gm.graph.erase_node(node)


# --- calls written out ---------------------------------------------------------------------------------------


def has_parameters(module: nn.Module) -> bool:
    """Tell whether a module or any part of it has a parameter."""
    return next(module.parameters(), None) is not None


def is_torch_module(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's own layers, without children or hooks."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    return own and not beside_forward(module) and not list(module.children())


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
