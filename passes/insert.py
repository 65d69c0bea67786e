"""Insertion: the plan carried out: a fake-quant for each weight, each (producer, format), each set of inputs on one scale."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pege_fx.modules.batch_norm import Fold
from pege_fx.modules.fake_quant import FakeQuant, Site
from pege_fx.modules.merged_norm import MergedNorm
from pege_fx.modules.schedule_state import ScheduleState
from pege_fx.numerics.spec import QuantSpec
from pege_fx.passes.computed_weights import ComputedWeight, ComputedWeights
from pege_fx.passes.graph import (
    after,
    behind_transposes,
    call_module,
    channels_of,
    copy_origin,
    first_argument,
    folded_weights,
    free_path,
    is_weight,
    join,
    joining_of,
    make_out_of_place,
    module_of,
    operand,
    recompute_operands,
    remove_unread_transposes,
    result_of,
    scope,
    set_operand,
    short_name,
    tensor_of,
    transposed_again,
)
from pege_fx.passes.program import Program, of_program
from pege_fx.policy.plan import Edge, Operation, Plan


@of_program
@dataclass(frozen=True)
class InsertFakeQuants:
    """Place the plan's fake-quants: parameter -> fake-quant -> operation, and producer -> fake-quant -> its readers."""

    seed: int = 0

    def __call__(self, program: Program) -> None:
        for gm in program.graphs:
            self._into(gm, program.plans[gm], program)

    def _into(self, gm: GraphModule, plan: Plan, program: Program) -> None:
        computed = any(edge.parts is not None for operation in plan.operations for edge in operation.edges)
        merged = program.merged_norms.get(gm, [])
        work = _Insertion(gm, self.seed, program.schedules, merged, ComputedWeights(gm).found if computed else {})
        nodes = {node.name: node for node in gm.graph.nodes}
        for operation in plan.operations:
            if shared := [edge for edge in operation.edges if edge.shared_with]:
                work.place_together(nodes[operation.node], shared)
            for edge in operation.edges:
                if edge.spec is not None and not edge.shared_with:
                    work.place(nodes[operation.node], operation, edge, edge.spec)
        work.remove_spare_folds()


def _on(device: torch.device | None, made: FakeQuant) -> FakeQuant:
    """Move a new module to where its model is."""
    return made if device in (None, made.site_key.device) else made.to(device)


@dataclass
class _Insertion:
    gm: GraphModule
    seed: int
    groups: dict[str, ScheduleState]
    merged: list[MergedNorm]
    computed: dict[tuple[Node, str], ComputedWeight]
    placed: dict[tuple[Node, QuantSpec, str], Node] = field(default_factory=dict)
    together: dict[tuple[frozenset[Node], QuantSpec, str], dict[Node, Node]] = field(default_factory=dict)
    folds: dict[Node, Fold] = field(default_factory=dict)
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.folds = folded_weights(self.gm)
        self.device = next((parameter.device for parameter in self.gm.parameters()), None)

    def place(self, node: Node, operation: Operation, edge: Edge, spec: QuantSpec) -> None:
        if edge.operand == "output":
            self._place_output(node, edge, spec)
            return
        source = operand(node, edge.operand)
        fold = self.folds.get(source)
        origin = first_argument(source) if fold is not None else source
        weight = edge.parts is not None or is_weight(self.gm, node, edge.operand, origin)
        read = source
        if edge.parts is not None:
            source = origin = self.computed[node, edge.operand].origin
        elif weight and fold is None:
            source = origin = behind_transposes(source)
        key = (source, spec, edge.group)
        if key not in self.placed:
            assert isinstance(origin, Node)
            path = f"{edge.source}_fq" if weight and edge.parts is None else join(scope(source), f"{short_name(source)}_fq")
            path = free_path(self.gm, path)
            module = self._weight(node, origin, path, edge, spec, fold) if weight else self._activation(path, edge, spec)
            self.placed[key] = self._insert(module, path, origin, before=node)
        self._read(node, edge, transposed_again(read, source, self.placed[key], before=node))
        if read is not source:
            remove_unread_transposes(read)

    def place_together(self, node: Node, edges: list[Edge]) -> None:
        """Place one fake-quant for several inputs of a node, right before it, where all of them are there to be seen."""
        first = edges[0]
        sources: list[Node] = list(dict.fromkeys(operand(node, edge.operand) for edge in edges))
        assert first.spec is not None
        key = (frozenset(sources), first.spec, first.group)
        if key not in self.together:
            path = free_path(self.gm, join(scope(node), f"{short_name(node)}_inputs_fq"))
            module = self._activation(path, first, first.spec, tuple(source.name for source in sources))
            self._add(path, module)
            more = [(0, *sources[1:]), *((number,) for number in range(1, len(sources)))]
            placed = [self._call(module, path, source, node, rest) for source, rest in zip(sources, more, strict=True)]
            self.together[key] = dict(zip(sources, placed, strict=True))
        for edge in edges:
            self._read(node, edge, self.together[key][operand(node, edge.operand)])

    def _read(self, node: Node, edge: Edge, placed: Node) -> None:
        set_operand(node, edge.operand, placed)
        if joining_of(node) is not None:
            make_out_of_place(self.gm, node)  # the original is still there for others
        if edge.recompute and (made := module_of(self.gm, placed, FakeQuant)) is not None:
            recompute_operands(node)
            made.recompute = True

    def _place_output(self, node: Node, edge: Edge, spec: QuantSpec) -> None:
        path = free_path(self.gm, join(scope(node), f"{short_name(node)}_fq"))
        result = result_of(self.gm, node)
        readers = list(result.users)
        placed = self._insert(self._activation(path, edge, spec), path, result, before=after(result))
        for reader in readers:
            reader.replace_input_with(result, placed)
            make_out_of_place(self.gm, reader)

    def _insert(self, module: FakeQuant, path: str, source: Node, before: Node) -> Node:
        self._add(path, module)
        return self._call(module, path, source, before)

    def _add(self, path: str, module: FakeQuant) -> None:
        module.training = module.method.training = self.gm.training
        module.merged = tuple(key for norm in self.merged for key in norm.tensors[:2] if key)
        self.gm.add_submodule(path, module)

    def _call(self, module: FakeQuant, path: str, source: Node, before: Node, more: tuple[Any, ...] = ()) -> Node:
        placed = call_module(self.gm.graph, path, source, before, f"{source.name}_fq", more)
        copy_origin(source, placed)
        placed.meta["site"] = module.site
        return placed

    def _weight(self, node: Node, origin: Node, path: str, edge: Edge, spec: QuantSpec, fold: Fold | None) -> FakeQuant:
        weight = self.computed[node, edge.operand].value if edge.parts is not None else tensor_of(self.gm, origin)
        assert weight is not None
        site = Site(name=self._name(path), kind="weight", spec=spec, rule=edge.rule, group=edge.group)
        channels = channels_of(node, edge.operand, weight)
        made = FakeQuant(site, self._group(edge), seed=self.seed, weight=weight, channels=channels, fold=fold)
        made.is_computed = edge.parts is not None
        return _on(self.device if made.is_computed else weight.device, made)

    def _activation(self, path: str, edge: Edge, spec: QuantSpec, inputs: tuple[str, ...] = ()) -> FakeQuant:
        site = Site(name=self._name(path), kind="activation", spec=spec, rule=edge.rule, group=edge.group, inputs=inputs)
        return _on(self.device, FakeQuant(site, self._group(edge), seed=self.seed))

    def _name(self, path: str) -> str:
        return join(self.gm.meta.get("prefix", ""), path)

    def _group(self, edge: Edge) -> ScheduleState:
        if edge.group not in self.groups:
            self.groups[edge.group] = ScheduleState(edge.group)
        return self.groups[edge.group]

    def remove_spare_folds(self) -> None:
        """Erase the weight folds that fake-quants have taken over."""
        for node in self.folds:
            if not node.users:
                path = str(node.target)
                self.gm.graph.erase_node(node)
                self.gm.delete_submodule(path)
