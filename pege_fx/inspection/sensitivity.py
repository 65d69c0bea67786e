"""How much each site costs: one at a time in float, or in fewer bits; and a mixed-precision policy for a budget from it."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import Progress
from torch import Tensor
from torch.fx import GraphModule, Node

from pege_fx._utils.listing import Listing
from pege_fx.errors import InputError, ModelError, OutputError, closest
from pege_fx.inspection.size import graphs_of
from pege_fx.modules.fake_quant import FakeQuant, fake_quants
from pege_fx.modules.mode import evaluating
from pege_fx.modules.stages import graph_of
from pege_fx.numerics.spec import METHODS, QuantSpec
from pege_fx.passes.graph import behind_transposes, join, module_of, operand
from pege_fx.policy.mixed_precision import Budget, mixed_precision
from pege_fx.policy.plan import FLOAT_BITS, Plan
from pege_fx.policy.rules import QuantPolicy
from pege_fx.training.batches import as_arguments, call, each_batch
from pege_fx.training.scheduler import plan_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metric: TypeAlias = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Effect:
    """One measurement.

    Attributes:
        site: path of the fake-quant.
        bits: it had; ``FLOAT_BITS`` is float.
        metric: with all other sites as they are.
        change: metric minus the baseline's.
    """

    site: str
    bits: int
    metric: float
    change: float


@dataclass(frozen=True)
class Sensitivity:
    """Effects of single sites, largest change first; prints as a table.

    Attributes:
        plan: of the model.
        baseline: the metric of the model as it is.
        effects: one for each site and number of bits that was tried.
        bits_now: of each site.
        readers: for each operation's path and operand, the site it reads.
        complete: False if the measurement was interrupted.
    """

    plan: Plan
    baseline: float
    effects: tuple[Effect, ...]
    bits_now: dict[str, int]
    readers: dict[tuple[str, str], str]
    complete: bool = True

    @property
    def listing(self) -> Listing:
        """The ranked table."""
        rows = tuple(
            (
                str(rank),
                effect.site,
                str(self.bits_now[effect.site]),
                _named(effect.bits),
                f"{effect.metric:.5g}",
                f"{effect.change:+.3g}",
            )
            for rank, effect in enumerate(self.effects, 1)
        )
        notes = [f"baseline: {self.baseline:.5g}; change: of the metric, where this site alone has other bits."]
        if not self.complete:
            notes.append(f"interrupted: {len({effect.site for effect in self.effects})} of {len(self.bits_now)} sites.")
        return Listing("Sensitivity", ("rank", "site", "bits", "tried", "metric", "change"), rows, tuple(notes))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.listing

    def __str__(self) -> str:
        return str(self.listing)

    def to_dict(self) -> dict[str, Any]:
        """Return baseline and effects as plain data."""
        return {
            "baseline": self.baseline,
            "complete": self.complete,
            "effects": [dataclasses.asdict(effect) | {"bits_now": self.bits_now[effect.site]} for effect in self.effects],
        }

    def to_json(self) -> str:
        """Return ``to_dict()`` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def plot(self, most: int = 30, ax: "Axes | None" = None) -> "Axes":
        """Draw the largest changes as bars, a colour for each number of bits tried, with matplotlib; returns the axes."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise OutputError("plot needs matplotlib: pip install 'pege_fx[examples]'.") from error
        sites = list(dict.fromkeys(effect.site for effect in self.effects))[:most]
        tried = sorted({effect.bits for effect in self.effects})
        if ax is None:
            ax = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(sites)), layout="constrained")[1]
        height = 0.8 / max(len(tried), 1)
        for number, bits in enumerate(tried):
            changes = {effect.site: effect.change for effect in self.effects if effect.bits == bits}
            places = [row - 0.4 + height * (number + 0.5) for row, site in enumerate(sites) if site in changes]
            widths = [changes[site] for site in sites if site in changes]
            label = "in float" if bits == FLOAT_BITS else f"in {bits} bits"
            ax.barh(places, widths, height=height, label=label)
        ax.set_yticks(range(len(sites)), sites, fontsize=8)
        ax.invert_yaxis()
        ax.axvline(0, color="grey", linewidth=0.8)
        ax.set_xlabel("change of the metric, this site alone")
        ax.legend(frameon=False)
        return ax

    def suggest(self, *, size: float | None = None, bit_operations: float | None = None) -> QuantPolicy:
        """Return a policy that keeps within a budget and hurts least, as far as single sites' changes add up.

        From the most bits tried for each site, it lowers, again and again, what gains most for the least change.

        Args:
            size: bytes of all quantized weights.
            bit_operations: multiply-accumulates times the bits of both factors, over quantized operations.

        Raises:
            InputError: if no budget is given, none of the bits tried can meet it, or effects are missing.
        """
        changes: dict[str, dict[int, float]] = {site: {bits: 0.0} for site, bits in self.bits_now.items()}
        for effect in self.effects:
            if effect.bits != FLOAT_BITS:
                changes[effect.site][effect.bits] = effect.change
        if not self.complete:
            raise InputError("the measurement was interrupted: a policy needs every site's effect.")
        return mixed_precision(self.plan, self.readers, changes, Budget(size, bit_operations))


def _named(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else str(bits)


def sensitivity(
    gm: GraphModule,
    batches: Iterable[Any],
    metric: Metric | None = None,
    *,
    bits: int | Sequence[int] | None = None,
    sites: Iterable[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure each site of a prepared model alone: what the metric becomes if it is in float, or in other bits.

    The model is evaluated fully quantized (p = 1) and left as it was. In other bits a site's grid is found by its
    method's own rule from the first batch. Ctrl-C stops the measurement and keeps what it has.

    Args:
        gm: a prepared model.
        batches: as ``calibrate`` takes them; they are kept in memory.
        metric: ``metric(output, batch)`` returns a number, less is better; its mean over the batches counts.
            Default: relative squared error of the outputs against the float model's.
        bits: numbers of bits to try; None tries float.
        sites: paths of fake-quants to look at; default: all.
        progress: show a bar on the terminal's error stream.

    Raises:
        InputError: if there is no batch, one does not fit, or the metric is not a finite number.
        ModelError: if ``gm`` was not prepared, or a site does not exist.

    >>> import pege_fx
    >>> import torch
    >>> from torch import nn
    >>> x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    >>> gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), "W4A4", x)
    >>> found = sensitivity(gm, [x], bits=(2, 4), progress=False)
    >>> weights = (4 * 8 + 8 * 2) * 3 // 8
    >>> [rule.match for rule in found.suggest(size=weights).rules[-2:]]
    ['0', '2']
    """
    gm = graph_of(gm, "prepared")
    plan, found = plan_of(gm), fake_quants(gm)
    chosen = _chosen(found, sites)
    tried = (FLOAT_BITS,) if bits is None else _checked(bits)
    kept = list(each_batch(batches, "sensitivity"))
    effects: list[Effect] = []
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not (progress and console.is_terminal))
    with evaluating(gm), bar:
        measure = _Measure(gm, kept, metric)
        baseline = measure()
        steps = [(name, width) for name in chosen for width in tried]
        try:
            for name, width in bar.track(steps, description="sensitivity"):
                with _as_float(found[name]) if width == FLOAT_BITS else _in_bits(found[name], width):
                    value = measure()
                effects.append(Effect(name, width, value, value - baseline))
        except KeyboardInterrupt:
            pass  # what was measured is worth having
    complete = len(effects) == len(steps)
    effects.sort(key=lambda effect: -abs(effect.change))
    now = {name: fq.site.spec.bits for name, fq in found.items() if name in chosen}
    return Sensitivity(plan, baseline, tuple(effects), now, dict(_readers(gm, plan)), complete)


def _chosen(found: dict[str, FakeQuant], sites: Iterable[str] | None) -> list[str]:
    chosen = list(found if sites is None else sites)
    for name in chosen:
        if name not in found:
            raise ModelError(f"no fake-quant is called {name!r}; closest: {closest(name, found)}.")
    return chosen


def _checked(bits: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(QuantSpec(bits=width).bits for width in ((bits,) if isinstance(bits, int) else bits))


class _Measure:
    """The mean of the metric over the batches, with the model as it is at the moment."""

    def __init__(self, gm: GraphModule, batches: list[Any], metric: Metric | None) -> None:
        self.gm, self.batches, self.metric = gm, batches, metric
        self.reference: list[list[Tensor]] = []
        if metric is None:
            with ExitStack() as stack:
                for fq in fake_quants(gm).values():
                    stack.enter_context(_as_float(fq))
                self.reference = [_tensors(output) for output in self._outputs()]

    def _outputs(self) -> Iterator[Any]:
        for batch in self.batches:
            args, kwargs = as_arguments(self.gm, batch)
            yield call(self.gm, args, kwargs)

    def __call__(self) -> float:
        values = [
            _error(output, self.reference[number]) if self.metric is None else float(self.metric(output, self.batches[number]))
            for number, output in enumerate(self._outputs())
        ]
        if not all(map(math.isfinite, values)):
            raise InputError(f"the metric is not a finite number: {values}.")
        return sum(values) / len(values)


def _error(output: Any, reference: list[Tensor]) -> float:
    """Squared error over the squared norm of the reference; it needs no labels."""
    pairs = list(zip(_tensors(output), reference, strict=True))
    error = sum(float((new.double() - old.double()).square().sum()) for new, old in pairs)
    norm = sum(float(old.double().square().sum()) for _, old in pairs)
    return error / norm if norm else error


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


@contextmanager
def _as_float(fq: FakeQuant) -> Iterator[None]:
    """Let a site hand its input on, with its BatchNorm folded in."""
    vars(fq)["forward"] = lambda x, *_: fq.leave(x, fq.enter(x))
    try:
        yield
    finally:
        del vars(fq)["forward"]


@contextmanager
def _in_bits(fq: FakeQuant, bits: int) -> Iterator[None]:
    """Give a site another grid, which the next forward initialises."""
    method, site, was_calibrated = fq.method, fq.site, fq.is_calibrated
    spec = dataclasses.replace(site.spec, bits=bits)
    other = METHODS[str(spec.method)](spec, site.kind, method.shape, method.channels)
    fq.site, fq.method = dataclasses.replace(site, spec=spec), other.to(fq.site_key.device).train(fq.training)
    fq.is_calibrated = False
    try:
        yield
    finally:
        fq.site, fq.method, fq.is_calibrated = site, method, was_calibrated


def _readers(gm: GraphModule, plan: Plan) -> Iterator[tuple[tuple[str, str], str]]:
    """For each operation's path and operand, the fake-quant it reads; an operation is of the innermost graph around it."""
    left = list(plan.operations)
    for path, inner in sorted(graphs_of(gm), key=lambda item: -len(item[0])):
        nodes = {node.name: node for node in inner.graph.nodes}
        here = [
            op
            for op in left
            if op.edges and op.node in nodes and (op.path == path or op.path.startswith(f"{path}." if path else ""))
        ]
        for operation in here:
            left.remove(operation)
            for edge in operation.edges:
                source = None
                if edge.operand != "output":
                    source = behind_transposes(operand(nodes[operation.node], edge.operand))
                if isinstance(source, Node) and module_of(inner, source, FakeQuant) is not None:
                    yield (operation.path, edge.operand), join(path, str(source.target))
