"""The plan: each operation of the graph under the policy. Changes nothing but ``meta``."""

import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import ParametrizationList

from pege_fx.errors import PolicyError
from pege_fx.modules.batch_norm import BatchNorm
from pege_fx.modules.fake_quant import fake_quants
from pege_fx.numerics.layouts import Kind, Tiling
from pege_fx.numerics.spec import METHODS, QuantSpec
from pege_fx.passes.computed_weights import ComputedWeight, ComputedWeights
from pege_fx.passes.costs import multiply_accumulates
from pege_fx.passes.graph import (
    behind_transposes,
    can_recompute,
    changes_its_input,
    channels_of,
    entry_of,
    first_argument,
    function_name,
    hides_weights,
    is_transpose,
    is_weight,
    join,
    joining_of,
    module_of,
    operand,
    operator_of,
    owner,
    parent_and_name,
    tensor_of,
    unfolded,
)
from pege_fx.passes.operators import Operator, targets_of
from pege_fx.passes.program import Program, of_program, warn
from pege_fx.passes.values import is_seen_elsewhere, tensors_of
from pege_fx.policy.plan import FLOAT_BY_POLICY, Edge, Operation, Plan
from pege_fx.policy.rules import NO_RULE, Choice, Op, QuantPolicy


@of_program
@dataclass(frozen=True)
class MakePlan:
    """Decide every edge of every operation by the policy; the result is ``Program.plans``.

    A rule has to decide somewhere in the model, which may be in another of its graphs.
    """

    policy: QuantPolicy

    def __call__(self, program: Program) -> None:
        described = describe(program.graphs)
        if not all(op.on_request for op in described.values()):
            self.policy.check_all_decide(described.values())
        for node, op in described.items():
            node.meta["op"] = op
        program.policy = self.policy
        program.plans = {gm: self._of_graph(gm) for gm in program.graphs}

    def _of_graph(self, gm: GraphModule) -> Plan:
        for node in gm.graph.find_nodes(op="get_attr"):
            if (value := tensor_of(gm, node)) is not None:
                node.meta["layout"] = value.layout
        operations = []
        computed = ComputedWeights(gm)
        tensors = tensors_of(gm) if self._joins(gm) else set()
        for node in gm.graph.nodes:
            if (op := node.meta.get("op")) is not None and op.on_request:
                if node in tensors and self.policy.is_about(op):
                    operations.append(_joining(gm, node, op, self.policy.choose(op), tensors))
            elif op is not None:
                operations.append(_operation(gm, node, op, self.policy.choose(op), computed))
            elif (skipped := _not_an_operator(gm, node)) is not None:
                operations.append(skipped)
        return Plan(type(gm).__name__, self.policy, tuple(operations))

    def _joins(self, gm: GraphModule) -> bool:
        """Whether a rule is about an addition, a concatenation or the like."""
        found = (node.meta.get("op") for node in gm.graph.nodes)
        return any(op is not None and op.on_request and self.policy.is_about(op) for op in found)


@of_program
def complete_plan(program: Program) -> None:
    """Put the plans of all graphs together, on the whole and on each fake-quant; warn if nothing is quantized."""
    operations = [operation for gm in program.graphs for operation in program.plans[gm].operations]
    root, sites = program.root, fake_quants(program.root).values()
    grids = sum(value.numel() for site in sites for value in site.method.parameters())
    parameters = sum(value.numel() for value in root.parameters()) - grids
    assert program.policy is not None, "MakePlan has not run"
    program.plan = Plan(type(root).__name__, program.policy, tuple(operations), tuple(program.captures), parameters)
    for site in sites:
        site.plan = program.plan
    root.meta["plan"] = program.plan
    warn_if_nothing(program.plan)


def warn_if_nothing(plan: Plan) -> None:
    """Warn if no edge is quantized, and say why, node by node."""
    if any(plan.quantized):
        return
    reasons = [f"  {op.path or op.node}: {op.reason or '; '.join(e.reason for e in op.edges)}" for op in plan.operations]
    listed = "\n".join(reasons) or "  the graph has no convolution, linear, embedding or matrix product."
    warn(f"nothing is quantized:\n{listed}")


def describe(family: list[GraphModule]) -> dict[Node, Op]:
    """Return what a rule can see of each operation, in the order of the graphs."""
    entries = [(gm, node, operator_of(node) or joining_of(node)) for gm in family for node in gm.graph.nodes]
    found = [(gm, node, op) for gm, node, op in entries if op is not None]
    weighted = [(gm, node) for gm, node, op in found if op.weights]
    roles = _roles(family, weighted or [(gm, node) for gm, node, op in found if not op.on_request])
    _share_roles(found, roles)
    used: Counter[str] = Counter()
    ops = {}
    for gm, node, described in found:
        prefix = gm.meta.get("prefix", "")
        path = node.meta.get("path")
        if path is None and not (gm.meta.get("is_operation") and described.weights):
            path = join(owner(node), described.name)
        path = join(prefix, path or "")
        used[path] += 1
        if used[path] > 1 and "path" not in node.meta:
            path = f"{path}_{used[path] - 1}"
        classes = node.meta.get("module_classes", frozenset())
        aliases, on_request = targets_of(described.name), described.on_request
        ops[node] = Op(path, described.name, classes, frozenset(roles.get(node, ())), aliases, on_request)
    return ops


def _roles(family: list[GraphModule], candidates: list[tuple[GraphModule, Node]]) -> dict[Node, set[str]]:
    """First: no other candidate before it on any path; last: none behind it.

    A module that stays Python stands for the candidates inside it, in the order of the model. If the model itself stays
    Python, that order is all that is known.
    """
    roles: dict[Node, set[str]] = {node: set() for _, node in candidates}
    if not candidates:  # nor, it may be, a graph
        return roles
    root = family[0]
    if root.meta.get("prefix", ""):
        roles[candidates[0][1]].add("first")
        roles[candidates[-1][1]].add("last")
        return roles
    inside: dict[Node, list[Node]] = {node: [node] for gm, node in candidates if gm is root}
    calls = {str(call.target): call for call in root.graph.find_nodes(op="call_module")}
    for gm, node in candidates:
        path = gm.meta.get("prefix", "")
        while path and path not in calls:
            path, _ = parent_and_name(path)
        if path and gm is not root:
            inside.setdefault(calls[path], []).append(node)
    for role, order, neighbours, end in (
        ("first", list(root.graph.nodes), lambda node: node.all_input_nodes, 0),
        ("last", list(reversed(root.graph.nodes)), lambda node: list(node.users), -1),
    ):
        passed: set[Node] = set()
        for node in order:
            if any(other in passed or other in inside for other in neighbours(node)):
                passed.add(node)
            elif node in inside:
                roles[inside[node][end]].add(role)
    return roles


def _share_roles(found: list[tuple[GraphModule, Node, Operator]], roles: dict[Node, set[str]]) -> None:
    """Operations that read one weight have one role, so that it has one format."""
    shared: dict[int, set[str]] = {}
    for gm, node, described in found:
        for name in described.weights:
            if node in roles and (parameter := _parameter(gm, operand(node, name))) is not None:
                common = shared.setdefault(id(parameter[1]), set())
                common |= roles[node]
                roles[node] = common


def _parameter(gm: GraphModule, node: object) -> tuple[str, Tensor] | None:
    """Return path and tensor of a weight or bias, looking through its fold, or through transposes."""
    node = behind_transposes(unfolded(gm, node))
    value = tensor_of(gm, node)
    return (str(node.target), value) if value is not None and isinstance(node, Node) else None


def _operation(gm: GraphModule, node: Node, op: Op, choice: Choice, computed: ComputedWeights) -> Operation:
    described = entry_of(node)
    edges = []
    for name in (*described.weights, *described.inputs):
        source = operand(node, name)
        if (weight := computed.found.get((node, name))) is not None:
            edges.append(_computed_weight_edge(node, name, weight, choice))
        elif name in described.weights or is_weight(gm, node, name, unfolded(gm, source)):
            edges.append(_weight_edge(gm, node, name, choice))
        elif source is not None:
            edges.append(_activation_edge(node, source, name, "input", choice))
    if choice.shared_scale:
        edges = _with_one_scale(node, op, edges, choice)
    edges = _recomputed(node, edges, choice)
    if choice.specs["output"] is not None:
        edges.append(_activation_edge(node, node, "output", "output", choice))
    if node in computed.makers:
        edges = [dataclasses.replace(edge, spec=None, reason=_COMPUTES_A_WEIGHT, note="") for edge in edges]
    parameters = _parameters_of(gm, node, computed)
    verdict, macs = node.meta.get("batch_norm", ""), multiply_accumulates(gm, node)
    return Operation(node.name, op.path, op.function, tuple(edges), verdict, parameters, macs=macs)


_COMPUTES_A_WEIGHT = "it computes a weight, which is quantized where it is read"


def _parameters_of(gm: GraphModule, node: Node, computed: ComputedWeights) -> int:
    """Elements of the parameters that an operation reads, directly or computed, each once."""
    read: dict[str, int] = {}
    for source in node.all_input_nodes:
        if (found := _parameter(gm, source)) is not None:
            read[found[0]] = found[1].numel()
        elif source in computed.constant:
            for part in computed.parts(source):
                read[part.path] = min(read.get(part.path, 0) + part.elements, part.whole)
    return sum(read.values())


def _joining(gm: GraphModule, node: Node, op: Op, choice: Choice, tensors: set[Node]) -> Operation:
    """Plan a node that joins tensors: each of them is an input; numbers beside them are none."""
    described = entry_of(node)
    sources = {name: source for name in described.inputs if (source := operand(node, name)) in tensors}
    edges = [_activation_edge(node, source, name, "input", choice) for name, source in sources.items()]
    if any(edge.spec for edge in edges) and (reason := _kept_in_place(gm, node, sources)):
        edges = [dataclasses.replace(edge, spec=None, reason=reason) for edge in edges]
    if choice.shared_scale:
        edges = _with_one_scale(node, op, edges, choice)
    edges = _recomputed(node, edges, choice)
    if choice.specs["output"] is not None:
        edges.append(_activation_edge(node, node, "output", "output", choice))
    parameters = sum(value.numel() for value in (tensor_of(gm, source) for source in sources.values()) if value is not None)
    reason = "" if edges else "its tensors come as one list, which another operation makes"
    return Operation(node.name, op.path, op.function, tuple(edges), "", parameters, reason, macs=0)


def _kept_in_place(gm: GraphModule, node: Node, sources: dict[str, Node]) -> str:
    """Why a node's inputs can not be replaced by quantized ones, where memory is written to; "" if they can."""
    if changes_its_input(gm, node) and is_seen_elsewhere(gm, node):
        return f"{node.name} works in place, on memory that something else may read: write it out of place"
    for source in sources.values():
        for reader in source.users:
            if reader is not node and first_argument(reader) is source and changes_its_input(gm, reader):
                return f"{reader.name} changes {source.name} in place"
    return ""


def _with_one_scale(node: Node, op: Op, edges: list[Edge], choice: Choice) -> list[Edge]:
    """Give the quantized inputs one format (signed if one of them may be negative), and say that they share its scale."""
    if not op.on_request and len(entry_of(node).inputs) < 2:
        raise PolicyError(
            f"{choice.shared_scale} asks for one scale for all inputs of {op.path} ({op.function}), which has one.\n"
            '  name what has several: Rule(function="add", input=..., shared_scale=True).'
        )
    if choice.rules["input"] == NO_RULE:
        raise PolicyError(f"{choice.shared_scale}: no rule gives the inputs of {op.path} a format; set input, too.")
    members = [edge for edge in edges if edge.spec is not None and not edge.is_weight]
    if len({edge.source for edge in members}) < 2:
        return edges
    spec = next((edge.spec for edge in members if edge.spec is not None and edge.spec.signed), members[0].spec)
    others = {edge.operand: tuple(member.operand for member in members if member is not edge) for edge in members}
    return [
        dataclasses.replace(edge, spec=spec, shared_with=others[edge.operand]) if edge.operand in others else edge
        for edge in edges
    ]


def _recomputed(node: Node, edges: list[Edge], choice: Choice) -> list[Edge]:
    """Say of quantized operands that they are made again in backward, if a rule asks for it and the operation can do it."""
    if not choice.recompute or not can_recompute(node):
        return edges
    return [
        dataclasses.replace(edge, recompute=edge.spec is not None and not is_transpose(operand(node, edge.operand)))
        for edge in edges
    ]


def _weight_edge(gm: GraphModule, node: Node, name: str, choice: Choice) -> Edge:
    spec, rule = choice.specs["weight"], choice.rules["weight"]
    source = operand(node, name)
    found = _parameter(gm, source) if is_weight(gm, node, name, unfolded(gm, source)) else None
    if found is None:
        if isinstance(source, Node):  # a weight that another operation computes
            return _activation_edge(node, source, name, "weight", choice)
        return Edge(name, "", None, rule, "its weight is not a tensor of the model", choice.schedule)
    path, value = found
    if spec is not None and not value.is_floating_point():
        return Edge(name, path, None, rule, f"its weight is {value.dtype}", choice.schedule)
    if spec is not None and value.layout is not torch.strided:
        return Edge(name, path, None, rule, f"its weight is sparse ({value.layout})", choice.schedule)
    return _edge_of_weight(node, name, path, value, choice)


def _computed_weight_edge(node: Node, name: str, weight: ComputedWeight, choice: Choice) -> Edge:
    edge = _edge_of_weight(node, name, weight.origin.name, weight.value, choice)
    return dataclasses.replace(edge, parts=weight.parts)


def _edge_of_weight(node: Node, name: str, source: str, value: Tensor, choice: Choice) -> Edge:
    spec, note = choice.specs["weight"], ""
    channels = channels_of(node, name, value)
    if spec is not None and channels is None and not spec.layout.of_matrix:
        note = "" if spec.granularity == "tensor" else "no axis of it is one of output channels"
        spec = dataclasses.replace(spec, granularity="tensor")
    edge = _edge(name, source, spec, "weight", False, choice.rules["weight"], choice.schedule)
    if edge.spec is not None:
        Tiling(edge.spec.layout, "weight", tuple(value.shape), channels).check(source)
    return dataclasses.replace(edge, elements=value.numel(), note=note)


def _activation_edge(reader: Node, source: object, name: str, field: str, choice: Choice) -> Edge:
    spec, rule = choice.specs[field], choice.rules[field]
    if not isinstance(source, Node):
        return Edge(name, "", None, rule, f"{name} is a constant of the code", choice.schedule)
    dtype = source.meta.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        return Edge(name, source.name, None, rule, f"{source.name} is {dtype}", choice.schedule)
    if (layout := source.meta.get("layout", torch.strided)) is not torch.strided:
        return Edge(name, source.name, None, rule, f"{source.name} is sparse ({layout})", choice.schedule)
    note = ""
    if spec is not None and field == "weight" and spec.granularity != "tensor":
        note, spec = "one that is computed anew in each call", dataclasses.replace(spec, granularity=None)
    edge = _edge(name, source.name, spec, "activation", bool(source.meta.get("non_negative")), rule, choice.schedule)
    if edge.spec is not None and edge.spec.layout.of_matrix:
        _check_rows(reader, edge, edge.spec)
    return dataclasses.replace(edge, note=note)


def _check_rows(node: Node, edge: Edge, spec: QuantSpec) -> None:
    """Refuse scales of tokens or groups, which lie along the last dimension, where features lie along another.

    Raises:
        PolicyError: with the layer and the rule.
    """
    described, what = entry_of(node), f'{node.name}: {edge.operand} granularity="{spec.granularity}"'
    if described.channels_first:
        raise PolicyError(
            f"{what} is along the last dimension, and features of {described.name} are along axis 1.\n  {edge.rule}\n"
            '  give granularity="tensor", or name the layers that it is meant for: Rule(function="linear", ...).'
        )
    if not METHODS[str(spec.method)].is_dynamic:
        raise PolicyError(
            f"{what} needs a dynamic scale: how many there are is not known before an activation is.\n  {edge.rule}\n"
            '  give method="dynamic", or granularity="tensor".'
        )


def _edge(name: str, source: str, spec: QuantSpec | None, kind: Kind, non_negative: bool, rule: str, group: str) -> Edge:
    if spec is None:
        return Edge(name, source, None, rule, FLOAT_BY_POLICY if rule.startswith("rule") else rule, group)
    return Edge(name, source, spec.resolve(kind, non_negative=non_negative), rule, "", group)


def _not_an_operator(gm: GraphModule, node: Node) -> Operation | None:
    """A module with a weight that is no operation of the table: stays float, and the reason says so."""
    if hides_weights(gm, node):
        path = join(gm.meta.get("prefix", ""), owner(node), function_name(node))
        reason = "torch.fx.wrap keeps the function whole: give example_inputs to look inside"
        count = sum(value.numel() for _, value in filter(None, (_parameter(gm, source) for source in node.all_input_nodes)))
        return Operation(node.name, path, function_name(node), (), "", count, reason)
    module = module_of(gm, node, nn.Module)
    if module is None or isinstance(module, (BatchNorm, ParametrizationList)):
        return None
    opened = "stays_python" in node.meta  # its children have rows of their own
    weights = [v for v in module.parameters(recurse=not opened) if v.ndim > 1 and v.is_floating_point()]
    if not weights:
        return None
    reason = node.meta.get("stays_python") or node.meta.get(
        "not_normalized", f"{type(module).__name__} is not among the operations that are quantized"
    )
    count = sum(value.numel() for value in module.parameters(recurse=not opened))
    return Operation(node.name, join(gm.meta.get("prefix", ""), str(node.target)), function_name(node), (), "", count, reason)
