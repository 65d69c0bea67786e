"""The first passes of ``prepare``: the model becomes graphs, with shapes from the example, and is held against them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from pege_fx.errors import InputError, VerifyError
from pege_fx.passes.capture.refusals import check_model
from pege_fx.passes.capture.shapes import record_shapes
from pege_fx.passes.capture.tiers import capture
from pege_fx.passes.capture.validate import fails_by_itself, validate
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
        while True:
            found = capture(model, program.example, self.blocks, refused, self.share_parameters)
            _record_classes(model, found.graphs)
            if program.example is None:
                break
            try:
                path = record_shapes(found.root, *program.example, found.graphs)
            except InputError as error:
                if fails_by_itself(model, found.root, program.example):
                    raise
                what = str(error).removeprefix("the model fails ").replace("in the model itself: ", "")
                raise VerifyError(_fault(model, f"fails where the model does not, {what}")) from error
            if path is None:
                break
            if path in refused:  # it stays Python already, and would be captured again without end
                raise VerifyError(_fault(model, f"refuses its own example in {path or 'the whole'}"))
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


def _fault(model: nn.Module, what: str) -> str:
    return f"what was captured of {type(model).__name__} {what}.\n  please report it."


def _warn_of(notes: list[Capture], has_examples: bool) -> None:
    """Warn of everything that was fixed, and of what stays Python; once for all modules of which the same is to be said."""
    fixed: dict[str, list[str]] = {}  # by path
    alike: dict[str, list[str]] = {}  # paths, by what is said of them
    for note in notes:
        where = f" ({note.place})" if note.place else ""
        if note.rung == "specialised":
            fixed.setdefault(note.path, []).append(f"\n  {note.reason}{where}")
        elif note.rung == "python":
            hint = "" if has_examples else "\n  example_inputs may allow to trace it."
            if "Cache, which a graph does not hold" in note.reason:
                hint = "\n  call it with use_cache=False, or set config.use_cache = False before prepare."
            alike.setdefault(f"Python: {note.reason}{where}{hint}", []).append(note.path)
    for what, paths in alike.items():
        warn(f"{_listed(paths)} {'stay' if len(paths) > 1 else 'stays'} {what}")
    fixed_alike: dict[str, list[str]] = {}
    for path, reasons in fixed.items():
        fixed_alike.setdefault("".join(reasons), []).append(path)
    given = "example inputs" if has_examples else "defaults of forward"
    for what, paths in fixed_alike.items():
        warn(f"{_listed(paths)}: fixed as in the {given}:{what}")


def _listed(paths: list[str], at_most: int = 3) -> str:
    """The paths of modules that are alike, the first of them by name."""
    names = [path or "the model" for path in paths]
    more = len(names) - at_most
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:at_most])} and {more} more"


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
