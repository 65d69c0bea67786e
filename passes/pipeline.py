"""Running passes: a pass changes a GraphModule in place, the runner lints, recompiles and says which pass failed."""

from collections.abc import Iterable
from typing import Any, TypeAlias, cast

from torch.fx import GraphModule

from pege_fx.passes.program import GraphPass, Program, ProgramPass

Pass: TypeAlias = GraphPass | ProgramPass


def name_of(step: Pass) -> str:
    """Return a pass as it would be written: a function's name, a dataclass's repr."""
    return getattr(step, "__name__", None) or repr(step)


class Pipeline(list[Pass]):
    """A list of passes, to print, extend and reorder.

    >>> print(Pipeline([run]))
    1. run: Apply each pass in place, to every graph before the next pass; an error names its pass. Return the program.
    """

    def __str__(self) -> str:
        return "\n".join(f"{number}. {name_of(step)}: {_summary(step)}" for number, step in enumerate(self, 1))


def _summary(step: Any) -> str:
    return (step.__doc__ or "").strip().split("\n")[0]


def apply(step: Pass, program: Program) -> None:
    """Apply one pass: to the program, if it takes that, else to each graph."""
    if getattr(step, "takes_program", False):
        cast(ProgramPass, step)(program)
    else:
        for gm in program.graphs:
            cast(GraphPass, step)(gm)


def run(graphs: Program | GraphModule | Iterable[GraphModule], passes: Iterable[Pass]) -> Program:
    """Apply each pass in place, to every graph before the next pass; an error names its pass. Return the program.

    Graphs are linted after every pass that is not this package's, before it, and at the end, and recompiled before such a
    pass, which may run them, and at the end: each takes as long as a pass.
    """
    program = Program.of(graphs)
    steps = list(passes)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        try:
            if not _is_own(step):
                for gm in program.graphs:
                    gm.recompile()
            apply(step, program)
            if not (_is_own(step) and _is_own(following)):
                for gm in program.graphs:
                    gm.graph.lint()
        except Exception as error:
            error.add_note(f"in pass {name_of(step)}")
            raise
    for gm in program.graphs:
        gm.recompile()
    return program


def _is_own(step: Pass | None) -> bool:
    return (getattr(step, "__module__", None) or "").startswith("pege_fx.passes.")
