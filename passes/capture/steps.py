"""The first passes of ``prepare``: the model becomes graphs, with shapes from the example, and is held against them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from pege_fx.passes.capture.refusals import check_model
from pege_fx.passes.capture.shapes import record_shapes
from pege_fx.passes.capture.tiers import capture
from pege_fx.passes.capture.validate import validate
from pege_fx.passes.graph import join, owner
from pege_fx.passes.program import Program, of_program, warn
from pege_fx.policy.plan import Capture
from pege_fx.policy.rules import class_names


@of_program
@dataclass(frozen=True)
class CaptureModel:
    """Capture the model as graphs; with an example, note the shape and type of every value.

    Attributes:
        blocks: patterns of module paths that become GraphModules of their own.
        share_parameters: hold the model's own parameters instead of copies.
    """

    blocks: Iterable[str] = ()
    share_parameters: bool = False

    def __call__(self, program: Program) -> None:
        model = program.model
        assert model is not None
        check_model(model)
        refused: list[str] = []
        while True:  # each round leaves one more module in Python, so it ends
            found = capture(model, program.example, self.blocks, refused, self.share_parameters)
            _record_classes(model, found.graphs)
            if program.example is None:
                break
            path = record_shapes(found.root, *program.example, found.graphs)
            if path is None:
                break
            refused.append(path)
        program.graphs, program.whole, program.captures = found.graphs, found.root, found.notes
        program.modules = list(found.root.modules())
        _warn_of(found.notes, program.example is not None)


@of_program
def check_capture(program: Program) -> None:
    """Run what was captured beside the model on the example, in both modes, and compare all that a call leaves."""
    if program.example is not None:
        assert program.model is not None
        validate(program.model, program.root, program.graphs, program.example)


def _warn_of(notes: list[Capture], has_examples: bool) -> None:
    """Warn of everything that was fixed, by module, and of what stays Python."""
    fixed: dict[str, list[str]] = {}
    for note in notes:
        if note.rung == "specialised":
            fixed.setdefault(note.path, []).append(f"{note.reason} ({note.place})")
        elif note.rung == "python":
            hint = "" if has_examples else "\n  example_inputs may allow to trace it."
            warn(f"{note.path or 'the model'} stays Python: {note.reason} ({note.place}){hint}")
    for path, reasons in fixed.items():
        given = "example inputs" if has_examples else "defaults of forward"
        lines = "".join(f"\n  {reason}" for reason in reasons)
        warn(f"{path or 'the model'}: fixed as in the {given}:{lines}")


def _record_classes(model: nn.Module, graphs: list[GraphModule]) -> None:
    """Note on every node which classes ``Rule(module=...)`` may name for it: those of the modules around it."""
    names = {path: class_names(module) for path, module in model.named_modules(remove_duplicate=False)}
    around: dict[str, frozenset[str]] = {"": names[""]}

    def classes(path: str) -> frozenset[str]:
        if path not in around:
            around[path] = classes(path.rpartition(".")[0]) | names.get(path, frozenset())
        return around[path]

    for gm in graphs:
        prefix: Any = gm.meta.get("prefix", "")
        for node in gm.graph.nodes:
            inner = str(node.target) if node.op == "call_module" else owner(node)
            node.meta["module_classes"] = classes(join(prefix, inner))
