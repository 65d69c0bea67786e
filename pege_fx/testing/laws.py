"""The laws of a graph rewrite, and a search for a graph that breaks one of them."""

import copy
import pickle
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias, get_args

import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample, Unsatisfiable
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from pege_fx.errors import InputError, LawError, closest
from pege_fx.inspection.diff import diff
from pege_fx.passes.graph import calls
from pege_fx.passes.pipeline import name_of
from pege_fx.testing.function import BuffersAfter, Gradients, assert_same_function
from pege_fx.testing.graphs import graph_modules
from pege_fx.testing.networks import networks
from pege_fx.testing.structure import isomorphic_up_to
from pege_fx.testing.trial import NotTriedError, Preserves, Rewrite, Trial, equal, same_state

_LARGER = 10.0


# --- laws: each raises an AssertionError where it is broken ---------------------------------------------------------


def runs(trial: Trial) -> None:
    """It raises nothing, and returns a GraphModule or None."""
    assert trial.after is not None


def lint(trial: Trial) -> None:
    """The graph is well formed, and what runs is the graph: ``recompile`` was called."""
    trial.after.graph.lint()
    assert trial.after.graph.python_code("self").src == trial.after.code, "what runs is not the graph: call gm.recompile()"


def untouched(trial: Trial) -> None:
    """If it returns a new graph, the one that it was given is as it was."""
    if trial.argument is trial.after:
        raise NotTriedError("it works in place")
    assert not (changes := diff(trial.before, trial.argument)), f"its argument has changed: {changes}"
    assert trial.argument.code == trial.before.code, "the code of its argument has changed"
    assert same_state(trial.before, trial.argument), "a parameter or buffer of its argument has changed"
    _assert_same_modes(trial.before, trial.argument)


def deterministic(trial: Trial) -> None:
    """Twice the same graph gives twice the same result."""
    _, again = trial.applied(trial.before)
    assert not (changes := diff(trial.after, again)), f"a second run on the same graph gives another one: {changes}"
    assert same_state(trial.after, again), "a second run on the same graph gives other parameters or buffers"


def idempotent(trial: Trial) -> None:
    """Once more changes nothing."""
    _, again = trial.applied(trial.after)
    assert isomorphic_up_to(again, trial.after), f"a second time changes the result: {diff(trial.after, again)}"
    assert_same_function(trial.after, again, trial.inputs, tolerance=0)


def modes(trial: Trial) -> None:
    """Training and evaluation mode are as they were."""
    _assert_same_modes(trial.before, trial.after)


def _assert_same_modes(before: nn.Module, after: GraphModule) -> None:
    known = {name: module.training for name, module in before.named_modules()}
    called = {str(node.target): module.training for node, module in calls(after, nn.Module)}
    wrong = [name for name, mode in called.items() if known.get(name, mode) != mode]
    assert not wrong, f"training has changed on {', '.join(wrong)}"


def state(trial: Trial) -> None:
    """Every parameter and buffer is there, under its name, with its value."""
    before, after = trial.before.state_dict(), trial.after.state_dict()
    assert not (missing := [name for name in before if name not in after]), f"gone from the state: {', '.join(missing)}"
    changed = [name for name, value in before.items() if not equal(value, after[name])]
    assert not changed, f"changed in the state: {', '.join(changed)}"


def same_structure(trial: Trial) -> None:
    """The nodes and edges are the same, but for their names."""
    assert isomorphic_up_to(trial.after, trial.before), f"the structure has changed: {diff(trial.before, trial.after)}"


def training(trial: Trial) -> None:
    """The same function in training mode."""
    trial.same(copy.deepcopy(trial.before).train(), copy.deepcopy(trial.after).train())


def evaluation(trial: Trial) -> None:
    """The same function in evaluation mode, on larger inputs too: what clips at 6 leaves most random numbers alone."""
    before, after = copy.deepcopy(trial.before).eval(), copy.deepcopy(trial.after).eval()
    trial.same(before, after)
    larger = tuple(_LARGER * x if isinstance(x, Tensor) and x.is_floating_point() else x for x in trial.inputs)
    if failure_before(trial, larger) is None:
        trial.same(before, after, larger)


def gradients(trial: Trial) -> None:
    """The same gradients of inputs, and of the parameters that are on both sides."""
    known = {name for name, _ in trial.after.named_parameters()}
    names = [name for name, _ in trial.before.named_parameters() if name in known]
    before, after = (Gradients(copy.deepcopy(gm).train(), names) for gm in (trial.before, trial.after))
    trial.same(before, after)


def statistics(trial: Trial) -> None:
    """Training moves the same buffers in the same way: a norm counts a batch though nobody reads its result."""
    known = {name for name, _ in trial.after.named_buffers()}
    names = [name for name, _ in trial.before.named_buffers() if name in known]
    before, after = (BuffersAfter(copy.deepcopy(gm).train(), names) for gm in (trial.before, trial.after))
    trial.same(before, after)


def copies(trial: Trial) -> None:
    """Copies by ``deepcopy`` and ``pickle`` compute the same, bit for bit."""
    assert_same_function(trial.after, copy.deepcopy(trial.after), trial.inputs, tolerance=0)
    assert_same_function(trial.after, pickle.loads(pickle.dumps(trial.after)), trial.inputs, tolerance=0)


def dtype(trial: Trial) -> None:
    """A float64 graph is rewritten as well, in float64."""
    wide, inputs = _moved(trial, torch.float64)
    _, after = trial.applied(wide)
    if trial.preserves == "nothing":
        after(*inputs)
    else:
        trial.same(wide, after, inputs)


def device(trial: Trial) -> None:
    """A graph on a second device is rewritten as well, on that device."""
    if not torch.cuda.is_available():
        raise NotTriedError("no second one: torch finds no CUDA device")
    there, inputs = _moved(trial, torch.device("cuda"), torch.float64)  # float32 may be TF32 there
    _, after = trial.applied(there)
    if trial.preserves == "nothing":
        after(*inputs)
    else:
        trial.same(there, after, inputs)


def _moved(trial: Trial, *target: Any) -> tuple[GraphModule, tuple[Any, ...]]:
    inputs = [x.to(*target) if isinstance(x, Tensor) and x.is_floating_point() else x for x in trial.inputs]
    return copy.deepcopy(trial.before).to(*target), tuple(inputs)


Law: TypeAlias = Callable[[Trial], None]

# In the order of being tried: what a later one reports would often be the fault of an earlier one.
LAWS: Mapping[str, Law] = {
    "runs": runs,
    "lint": lint,
    "untouched": untouched,
    "deterministic": deterministic,
    "modes": modes,
    "structure": same_structure,
    "training": training,
    "evaluation": evaluation,
    "gradients": gradients,
    "statistics": statistics,
    "state": state,
    "idempotent": idempotent,
    "copies": copies,
    "dtype": dtype,
    "device": device,
}
_ALWAYS = {"runs", "lint", "untouched", "deterministic", "modes", "idempotent", "copies", "dtype", "device"}
_FUNCTION = _ALWAYS | {"training", "evaluation", "gradients", "statistics", "state"}
_KEPT: Mapping[Preserves, set[str]] = {
    "structure": _FUNCTION | {"structure"},
    "bits": _FUNCTION,
    "function": _FUNCTION,
    "evaluation": _ALWAYS | {"evaluation"},
    "nothing": _ALWAYS,
}


# --- the search ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What ``check_pass`` has seen; prints as a sentence or two.

    Attributes:
        name: of the rewrite.
        preserves: what it keeps.
        laws: the laws that held wherever they could be tried.
        skipped: those that could be tried on no graph, and why.
        graphs: how many were tried.
        changed: how many of them the rewrite changed.
    """

    name: str
    preserves: Preserves
    laws: tuple[str, ...]
    skipped: Mapping[str, str]
    graphs: int
    changed: int

    def __str__(self) -> str:
        kept = {"bits": "function bit for bit", "evaluation": "function in evaluation mode"}.get(self.preserves, self.preserves)
        what = "" if self.preserves == "nothing" else f" keeps the {kept}"
        lines = [f"{self.name}{what}: {len(self.laws)} laws hold on {self.graphs} graphs, of which it changed {self.changed}."]
        lines += [f"  skipped: {law} ({reason})" for law, reason in self.skipped.items()]
        return "\n".join(lines)


def failure_before(trial: Trial, inputs: tuple[Any, ...] | None = None) -> Exception | None:
    """Return what the graph that was not rewritten raises on its inputs, or on others, if it does."""
    try:
        copy.deepcopy(trial.before)(*(trial.inputs if inputs is None else inputs))
    except Exception as error:
        return error
    return None


@dataclass
class _Search:
    """Tries the laws on one graph after another. Once a law is broken it tries that one alone, so that the graph shrinks."""

    rewrite: Rewrite
    preserves: Preserves
    laws: tuple[str, ...]
    tolerance: float | None
    graphs: int = 0
    changed: int = 0
    held: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    broken: str | None = None

    def trial(self, case: Any) -> Trial:
        module, inputs = case
        try:
            before = module if isinstance(module, GraphModule) else symbolic_trace(module)
        except Exception as error:
            raise InputError(
                f"torch.fx does not trace a module of graphs=: {type(error).__name__}: {error}\n  the module: {module!r}\n"
                "  let the strategy give a GraphModule; pege_fx.prepare makes one of any module."
            ) from error
        return Trial(self.rewrite, self.preserves, before.train(self.preserves != "evaluation"), tuple(inputs), self.tolerance)

    def breaks(self, case: Any) -> bool:
        trial = self.trial(case)
        if self.broken is not None:
            return self.error_of(self.broken, trial) is not None and failure_before(trial) is None
        self.graphs += 1
        for law in self.laws:
            if self.error_of(law, trial) is not None:
                if error := failure_before(trial):
                    said = f"{type(error).__name__}: {error}"
                    raise InputError(
                        f"a graph of graphs= fails on its own inputs, before any rewrite: {said}\n  the graph: {_shown(case)}\n"
                        "  let the strategy give inputs that the graph takes."
                    ) from error
                self.broken = law
                return True
        self.changed += trial.has_changed
        return False

    def error_of(self, law: str, trial: Trial) -> Exception | None:
        try:
            LAWS[law](trial)
        except NotTriedError as reason:
            self.skipped[law] = str(reason)
        except Exception as error:
            return error
        else:
            self.held[law] += 1
        return None

    def verdict(self) -> Verdict:
        if not self.changed and self.preserves != "structure":
            raise InputError(
                f"{name_of(self.rewrite)} changed none of {self.graphs} graphs, so nothing was checked.\n"
                "  give graphs= a strategy of graphs in which its pattern occurs, or a larger max_examples."
            )
        held = tuple(law for law in self.laws if self.held[law])
        skipped = {law: reason for law, reason in self.skipped.items() if not self.held[law]}
        return Verdict(name_of(self.rewrite), self.preserves, held, skipped, self.graphs, self.changed)

    def report(self, case: Any) -> LawError:
        assert self.broken is not None
        trial = self.trial(case)
        error = self.error_of(self.broken, trial)
        said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        lines = [f"{name_of(self.rewrite)} breaks a law: {self.broken}. {LAWS[self.broken].__doc__}", _indented(said, 2)]
        lines += ["  the smallest graph found:", _indented(_shown(case), 4)]
        if self.broken not in ("runs", "lint"):
            lines += ["  what the rewrite does to it:", _indented(str(diff(trial.before, trial.after)), 4)]
        found = LawError("\n".join(lines))
        found.__cause__ = error
        return found


def _shown(case: Any) -> str:
    """A case as the code that it prints as; of a plain pair the module, and the shapes of its inputs instead of all values."""
    if type(case) is not tuple:
        return repr(case)
    module, inputs = case
    shapes = (f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x) for x in inputs)
    return f"{module!r}\non {', '.join(shapes)}"


def _indented(text: str, spaces: int) -> str:
    return textwrap.indent(text, " " * spaces)


def check_pass(
    rewrite: Rewrite,
    preserves: Preserves = "function",
    *,
    graphs: st.SearchStrategy[Any] | None = None,
    without: Collection[str] = (),
    tolerance: float | None = None,
    max_examples: int = 50,
    seed: int = 0,
) -> Verdict:
    """Try every law on a rewrite of graphs, and shrink the first graph that breaks one.

    Args:
        rewrite: changes a ``GraphModule`` in place and returns None, as passes do here (``recompile`` is called for it), or
            returns another one.
        preserves: what it keeps. "structure": nodes and edges, as a pass that takes notes does; "bits": the function, bit
            for bit; "function": up to rounding; "evaluation": in evaluation mode only, in which the graph is given;
            "nothing": it changes the function on purpose, and keeps the laws that do not speak of it.
        graphs: a strategy of ``(GraphModule or nn.Module, inputs)``; default: ``graph_modules()`` and ``networks()``. Give
            one of your own where the pattern of the rewrite is rare.
        without: names of laws (see ``LAWS``) that it does not keep.
        tolerance: for ``assert_same_function``; default: derived from depth and dtype.
        max_examples: how many graphs; by default half of them are ``graph_modules()``.
        seed: of the search; the same one gives the same verdict.

    Returns:
        A verdict to print.

    Raises:
        LawError: says which law is broken, on which graph, as code, and what the rewrite does to it.
        InputError: if an option does not exist, a graph fails before it is rewritten, or the rewrite changed none of the
            graphs, so that nothing was checked.
    """
    if preserves not in get_args(Preserves):
        raise InputError(f"preserves={preserves!r}: give one of {', '.join(get_args(Preserves))}.")
    if unknown := sorted(set(without) - set(LAWS)):
        raise InputError(f"without={unknown[0]!r} is no law; closest: {closest(unknown[0], LAWS)}.")
    laws = tuple(law for law in LAWS if law in _KEPT[preserves] and law not in without)
    search = _Search(rewrite, preserves, laws, tolerance)
    examples = max_examples if graphs is not None else max(1, max_examples // 2)
    phases = (Phase.generate, Phase.shrink)
    options = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    # One after the other, and not as alternatives: a counterexample without a tracer is the easier one to read.
    for chosen in (graph_modules(), networks()) if graphs is None else (graphs,):
        try:
            case = find(chosen, search.breaks, settings=options, random=Random(seed))
        except NoSuchExample:
            continue
        except Unsatisfiable as error:
            raise InputError(
                "graphs= gives no graph: its filter lets none through.\n"
                "  make the pattern with map(), as docs/extending.md does, instead of waiting for it."
            ) from error
        raise search.report(case)
    return search.verdict()
