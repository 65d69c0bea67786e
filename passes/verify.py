"""Verification: the graph is what its plan says."""

from torch.fx import GraphModule, Node

from pege_fx.errors import VerifyError
from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.passes.graph import behind_transposes, calls, module_of, operand, result_of
from pege_fx.passes.program import Program, of_program
from pege_fx.policy.plan import Edge, Operation, Plan


@of_program
def verify(program: Program) -> None:
    """Check that every planned edge reads a fake-quant of its format, and that there is no other fake-quant."""
    for gm in program.graphs:
        _verify(gm, program.plans[gm])


def _verify(gm: GraphModule, plan: Plan) -> None:
    nodes = {node.name: node for node in gm.graph.nodes}
    planned: set[Node] = set()
    for operation, edge, spec in plan.quantized:
        placed = _fake_quant_on(gm, nodes.get(operation.node), edge, operation)
        found = module_of(gm, placed, FakeQuant)
        if placed is None or found is None or found.site.spec != spec:
            raise VerifyError(
                f"{operation.path}: {edge.operand} should read a fake-quant of {spec}, and reads {placed}.\n"
                "  a pass between the plan and here removed or replaced it."
            )
        planned.add(placed)
        for other in edge.shared_with:
            if module_of(gm, operand(nodes[operation.node], other), FakeQuant) is not found:
                raise VerifyError(f"{operation.path}: {edge.operand} and {other} should share one fake-quant, and do not.")
    extra = [node.name for node, _ in calls(gm, FakeQuant) if node not in planned]
    if extra:
        raise VerifyError(f"fake-quants that the plan does not name: {', '.join(extra)}.")


def _fake_quant_on(gm: GraphModule, node: Node | None, edge: Edge, operation: Operation) -> Node | None:
    if node is None:
        raise VerifyError(f"{operation.path}: its node {operation.node} is gone from the graph.")
    if edge.operand == "output":
        placed = next(iter(result_of(gm, node).users), None)
    else:
        placed = behind_transposes(operand(node, edge.operand))
    return placed if isinstance(placed, Node) else None
