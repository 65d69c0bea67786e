"""Running passes: a pass changes a GraphModule in place, the runner lints, recompiles and says which pass failed."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch.fx import GraphModule

Pass: TypeAlias = Callable[[GraphModule], None]


def name_of(step: Pass) -> str:
    """Return a pass as it would be written: a function's name, a dataclass's repr."""
    return getattr(step, "__name__", None) or repr(step)


class Pipeline(list[Pass]):
    """A list of passes, to print, extend and reorder.

    >>> print(Pipeline([run]))
    1. run: Apply each pass in place, to every graph before the next pass; an error names its pass.
    """

    def __str__(self) -> str:
        return "\n".join(f"{number}. {name_of(step)}: {_summary(step)}" for number, step in enumerate(self, 1))


def _summary(step: Any) -> str:
    return (step.__doc__ or "").strip().split("\n")[0]


def run(graphs: GraphModule | Iterable[GraphModule], passes: Iterable[Pass]) -> None:
    """Apply each pass in place, to every graph before the next pass; an error names its pass.

    Graphs are linted after every pass that is not this package's, before it, and at the end, and recompiled before such a
    pass, which may run them, and at the end: each takes as long as a pass.
    """
    family = [graphs] if isinstance(graphs, GraphModule) else list(graphs)
    steps = list(passes)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        for gm in family:
            try:
                if not _is_own(step):
                    gm.recompile()
                step(gm)
                if not (_is_own(step) and _is_own(following)):
                    gm.graph.lint()
            except Exception as error:
                error.add_note(f"in pass {name_of(step)}")
                raise
    for gm in family:
        gm.recompile()


def _is_own(step: Pass | None) -> bool:
    return (getattr(step, "__module__", None) or "").startswith("pege_fx.passes.")
