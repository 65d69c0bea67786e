"""How large a model is: as float, and with its codes packed to their bits."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.modules.batch_norm import FOLDED, BatchNorm, BiasFold, BiasFoldBehind, WeightFold
from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.modules.forward_method import Encoding
from pege_fx.modules.stages import check_stage, unwrapped
from pege_fx.numerics.functional import dequantize, quantize
from pege_fx.numerics.packing import unpack
from pege_fx.passes.graph import arguments, first_argument, join, module_of, tensor_of
from pege_fx.passes.values import computed, constants_of


@dataclass(frozen=True)
class SizeReport:
    """Bytes of parameters and buffers: as float, and as deployed with codes packed to their bits.

    Attributes:
        float_bytes: with all weights in float32.
        quantized_bytes: as deployed.
    """

    float_bytes: int
    quantized_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller."""
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
    float their own size. Of a prepared model: what ``convert`` will make of it.

    Args:
        gm: a prepared or a converted model; a float one has one size.

    Raises:
        ModelError: for an integer engine.

    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> print(size_report(gm))
    float 120 bytes, quantized 80 bytes: 1.5 times smaller
    """
    gm = unwrapped(gm)
    if check_stage(gm, "prepared", "converted", "float") == "prepared":
        return _expected(gm)
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


def graphs_of(gm: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """The graph and those inside modules that stay Python, by path."""
    for path, module in gm.named_modules():
        if isinstance(module, GraphModule):
            yield path, module


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
    for path, inner in graphs_of(gm):
        for node in inner.graph.find_nodes(op="call_function", target=dequantize):
            source, bits = first_argument(node), int(arguments(node)[1]["bits"])
            packed = source.target is unpack
            read = first_argument(source) if packed else source
            if (value := tensor_of(inner, read)) is not None:
                count = math.prod(arguments(source)[0][1]) if packed else value.numel()
                found[join(path, str(read.target))] = StoredCodes(bits, count, packed)
    return found


def _grids(gm: GraphModule) -> set[str]:
    """Scales, zero points and intervals: what the float model does not have."""
    found = set()
    for path, inner in graphs_of(gm):
        for function in (quantize, dequantize):
            for node in inner.graph.find_nodes(op="call_function", target=function):
                found |= {join(path, str(source.target)) for source in node.all_input_nodes[1:] if source.op == "get_attr"}
    return found


# --- before conversion -------------------------------------------------------------------------------------------


@torch.no_grad()
def _expected(gm: GraphModule) -> SizeReport:
    """What ``convert`` keeps: codes and grids for fake-quants, folded weights and biases, and what the graph reads as it is."""
    float_bytes = quantized_bytes = 0
    plain: dict[int, Tensor] = {}
    counted: set[FakeQuant] = set()
    for _, inner in graphs_of(gm):
        constant = constants_of(inner)
        taken = _taken(inner, constant)
        for node in inner.graph.nodes:
            plain |= {id(value): value for value in _read_as_it_is(inner, node) if node not in taken}
            module = module_of(inner, node, nn.Module)
            if isinstance(module, FakeQuant) and module not in counted:
                counted.add(module)
                source = first_argument(node)
                weight = computed(inner, source) if source in constant and _takes_constants(module) else None
                codes = 0 if weight is None else weight.numel()
                float_bytes += 4 * codes
                quantized_bytes += (module.site.spec.bits * codes + 7) // 8 + _grid_bytes(module, weight)
            elif isinstance(module, BiasFold):
                bias = _folded_bias_bytes(inner, node, module)
                float_bytes += bias
                quantized_bytes += bias
    kept = sum(map(_bytes, plain.values()))
    return SizeReport(float_bytes + kept, quantized_bytes + kept)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _folded_bias_bytes(gm: GraphModule, node: Node, module: BiasFold) -> int:
    """One value for each output channel: those that a BatchNorm behind the layer has, or those of the layer itself."""
    mean: Tensor = module.fold.bn.running_mean
    if not isinstance(module, BiasFoldBehind):
        return _bytes(mean)
    weight = tensor_of(gm, arguments(node)[0][1])
    assert weight is not None
    return weight.shape[0] * mean.element_size()


def _read_as_it_is(gm: GraphModule, node: Node) -> Iterable[Tensor]:
    """The tensors that a node brings into the deployed graph unchanged."""
    value = tensor_of(gm, node)
    if value is not None:
        return [value]
    module = module_of(gm, node, nn.Module)
    if module is None or isinstance(module, (FakeQuant, WeightFold, BiasFold, GraphModule, *FOLDED.values())):
        return []
    inside = [child for child in module.modules() if isinstance(child, GraphModule)]
    apart = {id(value) for child in inside for value in [*child.parameters(), *child.buffers()]}
    apart |= {
        id(child.num_batches_tracked) for child in module.modules() if isinstance(child, BatchNorm)
    }  # evaluation has no use
    return [value for value in [*module.parameters(), *module.buffers()] if id(value) not in apart]


def _taken(gm: GraphModule, constant: set[Node]) -> set[Node]:
    """Return the constants that only fake-quants, which leave codes of them, and folds read."""
    found: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        readers = [(user, module_of(gm, user, nn.Module)) for user in node.users]
        if node in constant and all(
            user in found or isinstance(reader, BiasFold) or (isinstance(reader, FakeQuant) and _takes_constants(reader))
            for user, reader in readers
        ):
            found.add(node)
    return found


def _takes_constants(fq: FakeQuant) -> bool:
    return fq.is_calibrated or fq.site.kind == "weight"


@torch.no_grad()
def _grid_bytes(fq: FakeQuant, weight: Tensor | None) -> int:
    """Constants that convert writes beside the codes: one grid, or two where codes mean something else than what made them."""
    if fq.method.is_dynamic and weight is None:
        return 0  # found in each call
    decoding = fq.decoding() if weight is None or not fq.method.is_dynamic else fq.evaluated(weight)[1]
    one_axis = not fq.method.tiling.layout.of_matrix
    if fq.fold is not None and fq.method.channels is not None and fq.method.shape is not None and one_axis:
        folded = decoding.scale * fq.fold.channels.broadcast(fq.fold.sign(), fq.method.shape)  # of its shape, once folded
        decoding = decoding._replace(scale=folded)
    grids: list[tuple[Tensor | None, ...]] = [decoding]
    if weight is None:
        encoding = fq.method.encoding()
        same = Encoding(*decoding)._replace(lower=encoding.lower, width=encoding.width)
        grids = [encoding] if _equal(encoding, same) else [encoding, decoding]
    return sum(4 * value.numel() for grid in grids for value in grid if value is not None)


def _equal(a: Encoding, b: Encoding) -> bool:
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))
