"""The plan: each operation of the graph under the policy. Changes nothing but ``meta``."""

import warnings
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.batch_norm import BatchNorm
from pege_fx.errors import PegeWarning
from pege_fx.passes.graph import (
    Operator,
    function_name,
    join,
    module_of,
    operand,
    operator_of,
    owner,
    owners,
    tensor_of,
    unfolded,
)
from pege_fx.plan import Edge, Operation, Plan
from pege_fx.policy import Choice, Op, QuantPolicy, class_names
from pege_fx.spec import Kind, QuantSpec


@dataclass(frozen=True)
class MakePlan:
    """Decide every edge of every operation by the policy; the result is ``gm.meta["plan"]``."""

    policy: QuantPolicy

    def __call__(self, gm: GraphModule) -> None:
        ops = describe(gm)
        if ops:
            self.policy.check_all_decide(ops.values())
        operations = []
        for node in gm.graph.nodes:
            if node in ops:
                operations.append(_operation(gm, node, ops[node], self.policy.choose(ops[node])))
            elif (skipped := _not_an_operator(gm, node)) is not None:
                operations.append(skipped)
        plan = Plan(type(gm).__name__, self.policy, tuple(operations))
        gm.meta["plan"] = plan
        if not any(plan.quantized):
            _warn_nothing(plan)


def _warn_nothing(plan: Plan) -> None:
    reasons = [f"  {op.path or op.node}: {op.reason or '; '.join(e.reason for e in op.edges)}" for op in plan.operations]
    listed = "\n".join(reasons) or "  the graph has no convolution, linear, embedding or matrix product."
    warnings.warn(f"nothing is quantized:\n{listed}", PegeWarning, stacklevel=2)


def describe(gm: GraphModule) -> dict[Node, Op]:
    """Return what a rule can see of each operation, in the graph's order."""
    found = [(node, described) for node in gm.graph.nodes if (described := operator_of(node)) is not None]
    roles = _roles(gm, [node for node, described in found if described.weight] or [node for node, _ in found])
    used: dict[str, int] = {}
    ops = {}
    for node, described in found:
        path = node.meta.get("path")
        if path is None:
            path = join(owner(node), described.name)
            used[path] = used.get(path, -1) + 1
            path = f"{path}_{used[path]}" if used[path] else path
        ops[node] = Op(path, described.name, _classes(gm, node), frozenset(roles.get(node, ())))
    return ops


def _classes(gm: GraphModule, node: Node) -> frozenset[str]:
    recorded = node.meta.get("module_classes")
    return recorded if recorded is not None else frozenset()


def _roles(gm: GraphModule, candidates: list[Node]) -> dict[Node, set[str]]:
    """First: no other candidate before it on any path; last: none behind it."""
    wanted = set(candidates)
    roles: dict[Node, set[str]] = {node: set() for node in candidates}
    for role, order, neighbours in (
        ("first", list(gm.graph.nodes), lambda node: node.all_input_nodes),
        ("last", list(reversed(gm.graph.nodes)), lambda node: list(node.users)),
    ):
        passed: set[Node] = set()
        for node in order:
            behind = any(other in passed or other in wanted for other in neighbours(node))
            if behind:
                passed.add(node)
            elif node in wanted:
                roles[node].add(role)
    return roles


def _parameter(gm: GraphModule, node: object) -> tuple[str, Tensor] | None:
    """Return path and tensor of a weight or bias, looking through its fold."""
    node = unfolded(gm, node)
    value = tensor_of(gm, node)
    return (str(node.target), value) if value is not None and isinstance(node, Node) else None


def _operation(gm: GraphModule, node: Node, op: Op, choice: Choice) -> Operation:
    described = operator_of(node)
    assert described is not None
    edges = []
    parameters = 0
    if described.weight is not None:
        found = _parameter(gm, operand(node, described.weight))
        bias = _parameter(gm, operand(node, "bias")) if "bias" in described.parameters else None
        parameters = sum(value.numel() for _, value in filter(None, (found, bias)))
        edges.append(_weight_edge(node, described, found, choice))
    edges += [_activation_edge(operand(node, name), name, "input", choice) for name in described.inputs]
    if choice.specs["output"] is not None:
        edges.append(_activation_edge(node, "output", "output", choice))
    return Operation(node.name, op.path, op.function, tuple(edges), node.meta.get("batch_norm", ""), parameters)


def _weight_edge(node: Node, described: Operator, found: tuple[str, Tensor] | None, choice: Choice) -> Edge:
    spec, rule = choice.specs["weight"], choice.rules["weight"]
    if found is None:
        source = operand(node, str(described.weight))
        if isinstance(source, Node):  # a weight that another operation computes
            return _activation_edge(source, "weight", "weight", choice)
        return Edge("weight", "", None, rule, "its weight is not a tensor of the model", choice.schedule)
    path, value = found
    if spec is not None and not value.is_floating_point():
        return Edge("weight", path, None, rule, f"its weight is {value.dtype}", choice.schedule)
    return _edge("weight", path, spec, "weight", False, rule, choice.schedule)


def _activation_edge(source: object, name: str, field: str, choice: Choice) -> Edge:
    spec, rule = choice.specs[field], choice.rules[field]
    if not isinstance(source, Node):
        return Edge(name, "", None, rule, f"{name} is a constant of the code", choice.schedule)
    dtype = source.meta.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        return Edge(name, source.name, None, rule, f"{source.name} is {dtype}", choice.schedule)
    return _edge(name, source.name, spec, "activation", bool(source.meta.get("non_negative")), rule, choice.schedule)


def _edge(name: str, source: str, spec: QuantSpec | None, kind: Kind, non_negative: bool, rule: str, group: str) -> Edge:
    if spec is None:
        return Edge(name, source, None, rule, "float by the policy" if rule.startswith("rule") else rule, group)
    return Edge(name, source, spec.resolve(kind, non_negative=non_negative), rule, "", group)


def _not_an_operator(gm: GraphModule, node: Node) -> Operation | None:
    """A module with a weight that is no operation of the table: stays float, and the reason says so."""
    module = module_of(gm, node, nn.Module)
    if module is None or isinstance(module, BatchNorm):
        return None
    weights = [value for value in module.parameters() if value.ndim > 1 and value.is_floating_point()]
    if not weights:
        return None
    reason = node.meta.get("not_normalized", f"{type(module).__name__} is not among the operations that are quantized")
    count = sum(value.numel() for value in module.parameters())
    return Operation(node.name, str(node.target), function_name(node), (), "", count, reason)


def record_classes(model: nn.Module, gm: GraphModule) -> None:
    """Note on every node which classes ``Rule(module=...)`` may name for it: those of the modules around it."""
    names = {path: class_names(module) for path, module in model.named_modules(remove_duplicate=False)}
    for node in gm.graph.nodes:
        around = [*owners(node), str(node.target)] if node.op == "call_module" else owners(node)
        node.meta["module_classes"] = frozenset().union(*(names.get(path, frozenset()) for path in around))
