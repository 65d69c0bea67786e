"""What a pass did: two graphs aligned node by node; added, removed and replaced nodes, and changed attributes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
from torch.fx import GraphModule

from pege_fx.errors import ModelError, closest
from pege_fx.inspection.changes import KINDS, Change, Kind, NodeView, Snapshot, snapshot
from pege_fx.inspection.diff_picture import draw_region
from pege_fx.inspection.size import graphs_of
from pege_fx.passes.pipeline import Pass, name_of
from pege_fx.policy.patterns import PathPattern

_SHOWN = 40


@dataclass(frozen=True)
class Diff:
    """The differences between two graphs; prints as text, ``draw`` makes a picture. It is false if there is none."""

    before: Snapshot
    after: Snapshot
    changes: tuple[Change, ...] = field(init=False)
    matched: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        aligned = _Alignment(self.before, self.after)
        object.__setattr__(self, "matched", aligned.matched)
        object.__setattr__(self, "changes", tuple(aligned.changes()))

    def of_kind(self, kind: Kind) -> list[Change]:
        """Return the changes of one kind, in the order of the graph."""
        return [change for change in self.changes if change.kind == kind]

    def __bool__(self) -> bool:
        return bool(self.changes)

    @cached_property
    def _headline(self) -> str:
        counts = ", ".join(f"{len(found)} {kind}" for kind in KINDS if (found := self.of_kind(kind)))
        same = len(self.after) - sum(change.after is not None for change in self.changes)
        return f"{counts or 'no difference'}; {same} nodes as before"

    def __str__(self) -> str:
        lines = [self._headline]
        for kind in KINDS[:3]:
            lines += _shortened([str(change) for change in self.of_kind(kind)])
        lines += _shortened(list(_grouped(self.of_kind("changed"))))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the changes as plain data."""
        return {
            "changes": [
                {
                    "kind": change.kind,
                    "before": str(change.before) if change.before else None,
                    "after": str(change.after) if change.after else None,
                    "details": list(change.details),
                }
                for change in self.changes
            ]
        }

    def draw(self, path: str | Path, match: str | None = None, *, context: int = 1) -> None:
        """Write a picture of what changed and its neighbours as SVG, PNG or PDF.

        Args:
            path: its ending says the format.
            match: only changed nodes whose names match, a glob or ``re:`` and a regular expression.
            context: how many edges to go from a changed node.

        Raises:
            OutputError: for another ending, or where nothing can be written.
            ModelError: if nothing matches, or the region is too large to be read.
        """
        draw_region(changed_region(self, match, context), path)


def changed_region(found: Diff, match: str | None = None, context: int = 1) -> "nx.DiGraph[str]":
    """Return the changed nodes and what is ``context`` edges from them.

    Nodes have ``kind`` ("added", "removed", "replaced", "changed" or "same") and ``label``; a removed node is called
    "-" and its name, as another of that name may be there now. ``match`` selects changed nodes by name.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    kinds = {change.after.name: change.kind for change in found.changes if change.after}
    for view in found.after.values():
        graph.add_node(view.name, kind=kinds.get(view.name, "same"), label=view.name)
        graph.add_edges_from((source, view.name) for source in view.inputs)
    present = {before: after for after, before in found.matched.items()}
    gone = {change.before.name: change.before for change in found.of_kind("removed") if change.before}
    for view in gone.values():
        graph.add_node(f"-{view.name}", kind="removed", label=view.name)
    for view in found.before.values():
        for source in view.inputs:
            if view.name in gone or source in gone:
                ends = (f"-{name}" if name in gone else present[name] for name in (source, view.name))
                graph.add_edge(*ends)
    pattern = PathPattern(match or "*")
    chosen = {name for name, kind in graph.nodes(data="kind") if kind != "same" and pattern.fullmatch(name.lstrip("-"))}
    if match is not None and not chosen:
        names = [name.lstrip("-") for name, kind in graph.nodes(data="kind") if kind != "same"]
        raise ModelError(f"match={match!r} selects none of {len(names)} changed nodes; closest: {closest(match, names)}.")
    both = graph.to_undirected(as_view=True)
    near = set(nx.multi_source_dijkstra_path_length(both, chosen, cutoff=context)) if chosen else set(graph)
    return nx.DiGraph(graph.subgraph(near))


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"  ... and {len(lines) - _SHOWN} more"]


def _grouped(changes: list[Change]) -> Iterator[str]:
    """One line for all nodes that changed alike."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for change in changes:
        assert change.after is not None
        groups.setdefault(change.details, []).append(change.after.name)
    for details, names in groups.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield f"* {shown}: {'; '.join(details)}"


class _Alignment:
    """Which node after is which node before: by name, then by what it computes, then by the place it takes."""

    def __init__(self, before: Snapshot, after: Snapshot) -> None:
        self.before, self.after = before, after
        self.matched = {name: name for name in after if name in before}
        self.used = set(self.matched.values())
        self._match_renamed()
        self._match_replaced()
        self.kept = {name: name for name in self.used}

    def _pair(self, after: str, before: str) -> None:
        self.matched[after] = before
        self.used.add(before)

    def _match_renamed(self) -> None:
        gone = {
            _meaning(view, view.inputs): view.name for view in reversed([*self.before.values()]) if view.name not in self.used
        }
        for view in self.after.values():
            if view.name in self.matched:
                continue
            meaning = _meaning(view, tuple(self.matched.get(source, "") for source in view.inputs))
            if (name := gone.pop(meaning, None)) is not None:
                self._pair(view.name, name)

    def _match_replaced(self) -> None:
        """What stands where another stood, as the readers of both tell; from the end, so that a reader comes first."""
        for view in reversed([*self.after.values()]):
            origin = self.before.get(self.matched.get(view.name, ""))
            if origin is None or len(origin.inputs) != len(view.inputs):
                continue
            for new, old in zip(view.inputs, origin.inputs, strict=True):
                if new not in self.matched and old not in self.used:
                    self._pair(new, old)

    def changes(self) -> Iterator[Change]:
        readers: dict[str, list[str]] = {}
        for view in self.after.values():
            for source in view.inputs:
                readers.setdefault(source, []).append(view.name)
        for view in self.after.values():
            origin = self.before.get(self.matched.get(view.name, ""))
            if origin is None:
                yield Change("added", None, view, _between(view, readers.get(view.name, [])))
            elif (view.op, view.target) != (origin.op, origin.target):
                yield Change("replaced", origin, view)
            elif details := tuple(self._details(origin, view)):
                yield Change("changed", origin, view, details)
        for view in self.before.values():
            if view.name not in self.used:
                yield Change("removed", view, None)

    def _details(self, origin: NodeView, view: NodeView) -> Iterator[str]:
        if view.name != origin.name:
            yield f"was called {origin.name}"
        if self._is_rewired(origin, view):
            yield f"reads {_listed(view.inputs)} instead of {_listed(origin.inputs)}"
        if origin.arguments != view.arguments:
            yield f"called with {view.arguments} instead of {origin.arguments}"
        for key in sorted({*origin.facts, *view.facts}):
            old, new = origin.facts.get(key), view.facts.get(key)
            if old != new:
                yield f"{key}: {new}" if old is None else f"{key}: {old} -> {new}"

    def _is_rewired(self, origin: NodeView, view: NodeView) -> bool:
        """Another input, not counting nodes that were put in between or taken out."""
        if len(origin.inputs) != len(view.inputs):
            return True
        return any(
            _origins(old, self.before, self.kept).isdisjoint(_origins(new, self.after, self.matched))
            for old, new in zip(origin.inputs, view.inputs, strict=True)
        )


def _origins(name: str, nodes: Snapshot, matched: Mapping[str, str]) -> set[str]:
    """The node's partner before; of a node without one, what its inputs lead to."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in matched:
            found.add(matched[name])
        else:
            waiting += nodes[name].inputs
    return found


def _meaning(view: NodeView, inputs: tuple[str, ...]) -> tuple[object, ...]:
    return view.op, view.target, view.arguments, inputs


def _between(view: NodeView, readers: list[str]) -> tuple[str, ...]:
    return (f"between {_listed(view.inputs)} and {_listed(readers)}",) if view.inputs and readers else ()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def diff(before: GraphModule, after: GraphModule) -> Diff:
    """Compare two graphs: before and after any passes, the library's or your own.

    Nodes are the same if they have the same name, or do the same with the same inputs; graphs inside modules that stay
    Python are compared as well. To see what a pass does that works in place, compare with a ``copy.deepcopy``.

    Args:
        before: a ``GraphModule``.
        after: another, or the same after passes.

    Raises:
        ModelError: if one of them is no ``GraphModule``.

    >>> import copy
    >>> import torch
    >>> from torch import nn
    >>> gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> changed = copy.deepcopy(gm)
    >>> changed.add_module("1", nn.Tanh())
    >>> print(diff(gm, changed))
    1 changed; 3 nodes as before
    * _1: module: ReLU() -> Tanh()
    """
    return Diff(_whole(before), _whole(after))


def _whole(gm: GraphModule) -> dict[str, NodeView]:
    if not isinstance(gm, GraphModule):
        raise ModelError(
            f"{type(gm).__name__} is no GraphModule: give what prepare, convert or torch.fx.symbolic_trace returns."
        )
    views: dict[str, NodeView] = {}
    for path, inner in graphs_of(gm):
        views |= snapshot(inner, path)
    return views


@dataclass
class PassTrace:
    """What each pass of a pipeline did: a list of (name of the pass, diff). Make it, then run ``watching(passes)``.

    Attributes:
        names: of the passes that ran.
        states: the graph before the first, and behind each.

    >>> import torch
    >>> from torch import nn
    >>> from pege_fx.passes import normalize, run
    >>> trace = PassTrace()
    >>> _ = run(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), trace.watching([normalize]))
    >>> print(trace)
    1. normalize: 2 added, 1 replaced; 2 nodes as before
    + _0_weight = 0.weight: float32[2, 2]
    + _0_bias = 0.bias: float32[2]
    ~ _0 = 0(input_1): Linear(in_features=2, out_features=2, bias=True)
      -> _0 = linear(input_1, _0_weight, _0_bias)
    """

    names: list[str] = field(default_factory=list)
    states: list[dict[str, NodeView]] = field(default_factory=list)

    def watching(self, passes: Iterable[Pass]) -> list[Pass]:
        """Return the passes with a look at the graph before the first and behind each."""
        steps: list[Pass] = [self._look("")]
        for step in passes:
            steps += [step, self._look(name_of(step))]
        return steps

    def _look(self, name: str) -> Callable[[GraphModule], None]:
        state: dict[str, NodeView] = {}
        self.names.append(name)
        self.states.append(state)

        def look(gm: GraphModule) -> None:
            state.update(snapshot(gm, gm.meta.get("prefix", "")))

        return look

    @property
    def steps(self) -> list[tuple[str, Diff]]:
        """Each pass by name, with what it changed."""
        pairs = zip(self.states, self.states[1:], strict=False)
        return [(name, Diff(before, after)) for name, (before, after) in zip(self.names[1:], pairs, strict=True)]

    def __getitem__(self, name: str) -> Diff:
        """Return what the first pass of that name (as far as a bracket) changed."""
        for known, found in self.steps:
            if name in (known, known.partition("(")[0]):
                return found
        raise ModelError(f"no pass is called {name!r}; there are {_listed(self.names[1:])}.")

    def __str__(self) -> str:
        return "\n".join(f"{number}. {name}: {found}" for number, (name, found) in enumerate(self.steps, 1))
