"""``if self.training``: a graph for each mode, merged into one that follows ``train()`` and ``eval()``."""

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pege_fx.modules.mode import CHECKS, TRAINING_MODE, TrainingMode, select_by_mode
from pege_fx.passes.graph import (
    after,
    arguments,
    call_function,
    calls,
    changes_its_input,
    first_argument,
    is_unknown_code,
    keeps_statistics,
    map_nodes,
    owner,
    remove_dead_nodes,
    set_arguments,
)
from pege_fx.passes.values import draws, makers


class MergeError(Exception):
    """Two branches that no single graph can hold without an effect in the wrong mode."""


def merge_branches(
    training: Graph, evaluation: Graph, root: nn.Module, values: tuple[Mapping[Node, Any], Mapping[Node, Any]] = ({}, {})
) -> Graph:
    """Add to the graph of training what only evaluation does, and select by mode where the two differ.

    Both sides are computed, one is used; deployment drops the other. So nothing on one side alone may work in place, and
    what only evaluation calls must have no state that training would change, and draw no random numbers. What stands on one
    side alone must be able to run in the other mode: what it reads has the same form in both, as the values say that nodes
    have on the example inputs (of training, of evaluation).

    Raises:
        MergeError: if something does.
    """
    ours, theirs = list(training.nodes), list(evaluation.nodes)
    alone: dict[Node, str] = {}
    (mode,) = training.find_nodes(op="call_module", target=TRAINING_MODE)
    union: dict[Node, Node] = {}
    matcher = SequenceMatcher(None, [_what(node) for node in ours], [_what(node) for node in theirs], autojunk=False)
    for tag, start, stop, other_start, other_stop in matcher.get_opcodes():
        if tag == "equal":
            for node, other in zip(ours[start:stop], theirs[other_start:other_stop], strict=True):
                _join(training, mode, node, other, union)
            continue
        for side, name in ((ours[start:stop], "training"), (theirs[other_start:other_stop], "evaluation")):
            _check_effects(root, side, name)
        alone |= dict.fromkeys(ours[start:stop], "training")
        for other in theirs[other_start:other_stop]:
            _check_state(root, other)
            with training.inserting_before(ours[start]):
                union[other] = training.node_copy(other, union.__getitem__)
            alone[union[other]] = "evaluation"
    _check_forms(training, alone, {union[other]: (values[0].get(union[other]), values[1].get(other)) for other in theirs})
    _only_in_their_mode(training, mode, alone)
    return training


def _check_effects(root: nn.Module, side: list[Node], name: str) -> None:
    """Refuse what would be seen if it ran in the other mode too."""
    for node in side:
        if node.op == "call_function" and keeps_statistics(root, node):
            raise MergeError(f"{node} keeps statistics in {name} alone")
        if changes_its_input(root, node) and not _is_made_by(root, first_argument(node), side):
            raise MergeError(f"{node} works in place in {name} alone")
        if node.op == "call_method" and is_unknown_code(root, node):
            raise MergeError(f"{node} calls an object in {name} alone")


def _check_forms(graph: Graph, alone: Mapping[Node, str], values: Mapping[Node, tuple[Any, Any]]) -> None:
    """Refuse a node of one side that reads what may have another form in the other mode."""
    selected: set[Node] = set()
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source in selected]
        if node in alone:
            if sources:
                raise MergeError(f"{node}, in {alone[node]} alone, reads {sources[0]}, which the other mode may make otherwise")
        elif node.target is select_by_mode or sources:
            first, second = (_form(value) for value in values.get(node, (None, None)))
            if first is None or first != second:
                selected.add(node)


def _form(value: Any) -> Any:
    """What an operation may ask of a value before it computes: classes, sizes, types; None if nothing is known."""
    if isinstance(value, Tensor):
        return Tensor, value.shape, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        parts = [_form(part) for part in value]
        return None if None in parts else (type(value), parts)
    if isinstance(value, dict):
        parts = [(key, _form(part)) for key, part in value.items()]
        return None if any(part is None for _, part in parts) else (type(value), parts)
    return (type(value), value) if isinstance(value, (bool, int, float, str)) else None


def _only_in_their_mode(graph: Graph, mode: Node, alone: Mapping[Node, str]) -> None:
    """Let the checks of one side be for its mode."""
    checks = [node for node in alone if node.target in CHECKS]
    evaluates: Node | None = None
    for node in checks:
        if alone[node] == "evaluation" and evaluates is None:
            evaluates = call_function(graph, select_by_mode, (mode, False, True), {}, after(mode))
        args, kwargs = arguments(node)
        set_arguments(node, args, {**kwargs, "active": mode if alone[node] == "training" else evaluates})


def _what(node: Node) -> tuple[Any, ...]:
    args, kwargs = arguments(node)
    asked = args[1:] if node.target is getattr or node.target in CHECKS else ()  # never selected
    return node.op, node.target, owner(node), len(args), tuple(kwargs), repr(asked)  # the arguments themselves are selected


def _join(graph: Graph, mode: Node, node: Node, other: Node, union: dict[Node, Node]) -> None:
    """Let ``node`` stand for both: where the two read different nodes, it reads the selection."""
    union[other] = node
    args, kwargs = arguments(node)
    other_args, other_kwargs = (map_nodes(part, union.__getitem__) for part in arguments(other))

    def pick(a: Any, b: Any) -> Any:
        if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
            return type(a)(pick(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
            return {key: pick(a[key], b[key]) for key in a}
        if a is b or (not isinstance(a, Node) and type(a) is type(b) and a == b):
            return a
        if a is True and b is False:
            return mode
        return call_function(graph, select_by_mode, (mode, a, b), {}, node)

    set_arguments(node, pick(args, other_args), pick(kwargs, other_kwargs))


def _is_made_by(root: nn.Module, value: Any, nodes: list[Node]) -> bool:
    """Whether the nodes make this tensor, so that nobody else sees what happens to it."""
    walked = list(makers(root, value))
    return bool(walked) and walked[-1][1] and all(node in nodes for node, _ in walked)


def _check_state(root: nn.Module, node: Node) -> None:
    """Refuse what evaluation alone calls if running it in training too would be seen."""
    if node.op != "call_module":
        return
    called = root.get_submodule(str(node.target))
    if draws(called) or list(called.buffers()):
        raise MergeError(f"{node.target}, which evaluation alone calls, has a state or draws random numbers")


def drop_training_branches(gm: GraphModule) -> None:
    """Fix the mode to evaluation: every selection becomes its side of evaluation, what only training needs goes."""
    modes = [node for node, _ in calls(gm, TrainingMode)]
    pure = [node for node in gm.graph.nodes if node.users or keeps_statistics(gm, node)]
    for node in [user for mode in modes for user in mode.users]:
        args, kwargs = (map_nodes(part, lambda n: False if n in modes else n) for part in arguments(node))
        set_arguments(node, args, kwargs)
        if node.target is select_by_mode:
            node.replace_all_uses_with(args[2])
        elif node.target in CHECKS:
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        args, kwargs = arguments(node)
        if node.target in CHECKS and kwargs.pop("active", None):  # those of evaluation are for every call now
            set_arguments(node, args, {})
    remove_dead_nodes(gm, pure)
    while unread := [node for node in gm.graph.nodes if _changes_for_nobody(gm, node)]:
        for node in unread:
            gm.graph.erase_node(node)
        remove_dead_nodes(gm, pure)


def _changes_for_nobody(gm: GraphModule, node: Node) -> bool:
    """Whether a node works in place on a tensor that nobody reads."""
    if node.users or not changes_its_input(gm, node):
        return False
    walked = list(makers(gm, first_argument(node)))
    return bool(walked) and walked[-1][1] and all(len(source.users) == 1 for source, _ in walked)
