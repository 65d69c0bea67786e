"""Tables for people: what is quantized, how, by which rule, and why the rest is not; how large the model is."""

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule

from pege_fx.errors import ModelError, closest
from pege_fx.functional import dequantize, quantize
from pege_fx.packing import unpack
from pege_fx.passes.graph import arguments, first_argument, join, tensor_of
from pege_fx.plan import FLOAT_BY_POLICY, Edge, Operation, Plan
from pege_fx.scheduler import plan_of

PLAIN_WIDTH = 200


@dataclass(frozen=True)
class Listing:
    """A table that prints as text, and in colour where rich prints it; ``rows`` holds its cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=Text(self.title), title_justify="left", box=None, pad_edge=False)
        for column in self.columns:
            table.add_column(Text(column), overflow="fold", no_wrap=column == self.columns[0])
        for row in self.rows:
            table.add_row(*map(Text, row))
        yield table
        yield from map(Text, self.notes)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=PLAIN_WIDTH, color_system=None).print(self, markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _bits(edge: Edge | None) -> str:
    if edge is None:
        return "-"
    return "float" if edge.spec is None else str(edge.spec.bits)


def _signs(edges: Iterable[Edge]) -> str:
    return "/".join("s" if edge.spec.signed else "u" for edge in edges if edge.spec is not None) or "-"


def _words(edges: Iterable[Edge], field: str) -> str:
    return "/".join(dict.fromkeys(str(getattr(edge.spec, field)) for edge in edges if edge.spec is not None)) or "-"


def _rule_number(edge: Edge) -> str:
    return edge.rule.partition(":")[0] if edge.rule.startswith("rule") else ""


def _why(operation: Operation) -> str:
    """The rules that decided, by number; and for edges that are float for another cause, the reason."""
    if operation.reason:
        return operation.reason
    words: dict[str, None] = {}
    for edge in operation.edges:
        by_rule = edge.spec is not None or edge.reason == FLOAT_BY_POLICY
        words[_rule_number(edge) if by_rule else f"{edge.operand}: {edge.reason}"] = None
    return "; ".join(word for word in words if word)


def _verdict(operation: Operation) -> str:
    """The BatchNorm's verdict; a BatchNorm beside the operation by its name alone."""
    beside = operation.path.rpartition(".")[0]
    return operation.batch_norm.replace(f" {beside}.", " ") or "-"


_COLUMNS = ("path", "op", "weight", "input", "sign", "method", "estimator", "BatchNorm", "parameters", "rule or reason")


def _row(operation: Operation) -> tuple[str, ...]:
    inputs = [edge for edge in operation.edges if edge.operand not in ("weight", "output")]
    return (
        operation.path,
        operation.function,
        _bits(operation.edge("weight")),
        "/".join(dict.fromkeys(map(_bits, inputs))) or "-",
        _signs(operation.edges),
        _words(operation.edges, "method"),
        _words(operation.edges, "estimator"),
        _verdict(operation),
        f"{operation.parameters:,}",
        _why(operation),
    )


def table(plan: Plan, title: str) -> Listing:
    """Return a plan as a table, one row for each operation."""
    edges = [edge for operation in plan.operations for edge in operation.edges]
    quantized = sum(edge.spec is not None for edge in edges)
    note = f"{quantized} of {len(edges)} edges quantized; sign: s signed, u unsigned, in the order weight / inputs."
    rules = sorted(
        {edge.rule for edge in edges if edge.rule.startswith("rule")}, key=lambda rule: int(rule.split()[1].rstrip(":"))
    )
    captures = [
        f"{note.path or 'the model'}: {note.rung}, {note.reason} ({note.place})" for note in plan.captures if note.reason
    ]
    return Listing(title, _COLUMNS, tuple(map(_row, plan.operations)), (note, *rules, *captures))


@dataclass(frozen=True)
class Explanation:
    """A plan to read: prints as a table; ``explanation["layer1.0.conv1"]`` is one operation's decisions."""

    plan: Plan
    title: str

    @property
    def listing(self) -> Listing:
        return table(self.plan, self.title)

    def __getitem__(self, path: str) -> Operation:
        for operation in self.plan.operations:
            if path in (operation.path, operation.node):
                return operation
        names = [operation.path for operation in self.plan.operations]
        raise ModelError(f"no operation is called {path!r}; closest: {closest(path, names)}.")

    def __rich__(self) -> Listing:
        return self.listing

    def __str__(self) -> str:
        return str(self.listing)


def summary(gm: GraphModule) -> Listing:
    """Return a table of a prepared model: bits, sign, method, estimator, rule, BatchNorm verdict, parameters.

    Raises:
        ModelError: if ``gm`` was not prepared.
    """
    plan = plan_of(gm)
    return table(plan, f"{plan.model}: prepared")


@dataclass(frozen=True)
class SizeReport:
    """Bytes of parameters and buffers: as float, and as deployed with codes packed to their bits."""

    float_bytes: int
    quantized_bytes: int

    @property
    def ratio(self) -> float:
        return self.float_bytes / self.quantized_bytes if self.quantized_bytes else 1.0

    def __str__(self) -> str:
        return f"float {_human(self.float_bytes)}, quantized {_human(self.quantized_bytes)}: {self.ratio:.1f} times smaller"


def _human(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def size_report(gm: GraphModule) -> SizeReport:
    """Count the bytes of a converted model, and of the same model with its weights in float32.

    Codes count their bits (b * n / 8, rounded up per weight), as ``save_deployed`` stores them; scales and what stayed
    float their own size.
    """
    codes, grids = stored_codes(gm), _grids(gm)
    float_bytes = quantized_bytes = 0
    for name, value in [*gm.named_parameters(), *gm.named_buffers()]:
        if (stored := codes.get(name)) is not None:
            float_bytes += 4 * stored.count
            quantized_bytes += stored.bytes
        else:
            own = value.numel() * value.element_size()
            quantized_bytes += own
            float_bytes += 0 if name in grids else own
    return SizeReport(float_bytes, quantized_bytes)


@dataclass(frozen=True)
class StoredCodes:
    """One tensor of a converted model that holds codes: how many, in how many bits, packed or one to an element."""

    bits: int
    count: int
    packed: bool

    @property
    def bytes(self) -> int:
        return (self.bits * self.count + 7) // 8


def stored_codes(gm: GraphModule) -> dict[str, StoredCodes]:
    """Return the tensors of a converted model that hold codes, by name."""
    found = {}
    for path, inner in _graphs(gm):
        for node in inner.graph.find_nodes(op="call_function", target=dequantize):
            source, bits = first_argument(node), int(arguments(node)[1]["bits"])
            packed = source.target is unpack
            read = first_argument(source) if packed else source
            if (value := tensor_of(inner, read)) is not None:
                count = math.prod(arguments(source)[0][1]) if packed else value.numel()
                found[join(path, str(read.target))] = StoredCodes(bits, count, packed)
    return found


def _graphs(gm: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """The graph and those inside modules that stay Python, by path."""
    for path, module in gm.named_modules():
        if isinstance(module, GraphModule):
            yield path, module


def _grids(gm: GraphModule) -> set[str]:
    """Scales, zero points and intervals: what the float model does not have."""
    found = set()
    for path, inner in _graphs(gm):
        for function in (quantize, dequantize):
            for node in inner.graph.find_nodes(op="call_function", target=function):
                found |= {join(path, str(source.target)) for source in node.all_input_nodes[1:] if source.op == "get_attr"}
    return found
