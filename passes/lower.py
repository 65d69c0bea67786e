"""Lowering: fake-quants become integers with their scales, folded BatchNorms become part of weight and bias."""

import contextlib
import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.modules.batch_norm import BiasFold, Folded, WeightFold
from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.modules.forward_method import Decoding
from pege_fx.modules.mode import PythonForward
from pege_fx.numerics.functional import QParams, dequantize, dynamic_qparams, quantize
from pege_fx.numerics.layouts import Tiling
from pege_fx.numerics.packing import integer_bias, pack, unpack
from pege_fx.numerics.spec import METHODS, QuantSpec
from pege_fx.passes.capture.bytecode import names_in_forward
from pege_fx.passes.capture.grafts import read_from_outside
from pege_fx.passes.graph import (
    arguments,
    attribute_of,
    call_function,
    calls,
    copy_origin,
    first_argument,
    free_path,
    get_attr,
    keep_operands,
    operand,
    operator_of,
    parent_and_name,
    register_buffer,
    remove_dead_nodes,
    replace,
    set_operand,
    tensor_of,
)
from pege_fx.passes.values import computed, constants_of


@torch.no_grad()
def lower_weights(gm: GraphModule) -> None:
    """Hold what no input decides as integer codes with a scale: codes -> dequantize -> operation.

    These are weights, as parameters or computed from them (by a weight norm), and other operands that are.
    """
    constant = constants_of(gm)
    for node, fq in calls(gm, FakeQuant):
        source = first_argument(node)
        if source not in constant or not (fq.is_calibrated or fq.site.kind == "weight"):
            continue
        weight = computed(gm, source)
        if not fq.is_calibrated:
            fq.initialize_from(weight)
        levels, decoding = fq.evaluated(weight)
        tiling, number_format = fq.method.tiling, fq.site.spec.number_format
        codes = tiling.untiled(number_format.encode(levels), weight)
        path = str(source.target if source.op == "get_attr" else node.target).removesuffix("_fq")
        codes_path = free_path(gm, f"{path}_codes")
        register_buffer(gm, codes_path, codes)
        read = get_attr(gm.graph, codes_path, node)
        grid = _constants(gm, path, decoding.map(tiling.kept), weight.dtype, node)
        settings = _settings(fq.site.spec, tiling)
        del settings["signed"]
        _finish(gm, node, read, grid, settings, weight.dtype)


def call_originals(gm: GraphModule) -> None:
    """Call torch's own operations where training had variants that keep less for backward."""
    keep_operands(gm)


def follow_norms(gm: GraphModule) -> None:
    """Let every fold look at the BatchNorm that the graph calls now, as its next forward would."""
    for node, module in calls(gm, BiasFold):
        module(*_values(gm, node))


@torch.no_grad()
def lower_folds(gm: GraphModule) -> None:
    """Store weights and biases with their BatchNorm folded in, and drop the BatchNorms."""
    folds = [(node, module(*_values(gm, node))) for kind in (WeightFold, BiasFold) for node, module in calls(gm, kind)]
    for node, value in folds:
        path = free_path(gm, f"{node.target}ed")
        register_buffer(gm, path, value.clone())
        replace(gm, node, get_attr(gm.graph, path, before=node))
    for node, module in calls(gm, nn.Module):
        if isinstance(module, Folded):
            replace(gm, node, first_argument(node))


def _values(gm: GraphModule, node: Node) -> list[Any]:
    """What a fold gets: what its operands name."""
    return [None if source is None else attribute_of(gm, source) for source in arguments(node)[0]]


def lower_activations(gm: GraphModule) -> None:
    """Write every quantized activation as quantize -> dequantize."""
    dtype = next((p.dtype for p in (*gm.parameters(), *gm.buffers()) if p.is_floating_point()), torch.float32)
    grids: dict[FakeQuant, tuple[list[Node | None], list[Node | None]]] = {}
    for node, fq in calls(gm, FakeQuant):
        if fq not in grids:  # inputs that share one scale read the same constants
            grids[fq] = _grids(gm, fq, node, dtype)
        (inputs, outputs), settings = grids[fq], _settings(fq.site.spec, fq.method.tiling)
        if fq.method.is_dynamic:
            inputs, outputs = _dynamic_grid(gm, fq, node, settings)
        of_codes = settings | ({"narrow": True} if fq.site.spec.narrow else {})
        codes = call_function(
            gm.graph, quantize, (first_argument(node), *inputs), of_codes, node, node.name.replace("_fq", "_q")
        )
        copy_origin(node, codes)
        del settings["signed"]
        _finish(gm, node, codes, outputs, settings, dtype)


def _settings(spec: QuantSpec, tiling: Tiling) -> dict[str, Any]:
    """What ``quantize`` and ``dequantize`` are told of a format and a layout beside their constants."""
    settings: dict[str, Any] = {"bits": spec.bits, "signed": spec.signed}
    if spec.format is not None:
        settings["format"] = spec.format
    if tiling.layout.of_matrix:
        settings["layout"] = tiling.layout.name
        if tiling.kind == "weight":
            settings["axis"] = 0 if tiling.channels is None else tiling.channels.axis
    return settings


def _dynamic_grid(
    gm: GraphModule, fq: FakeQuant, node: Node, settings: dict[str, Any]
) -> tuple[list[Node | None], list[Node | None]]:
    """Write the search for the grid of the tensor at hand: what makes codes, and what they stand for."""
    spec = fq.site.spec
    wanted = settings | {"method": spec.method} | ({"narrow": True} if spec.narrow else {})
    wanted |= {} if spec.scale == "float32" else {"scale": spec.scale}
    name = node.name.replace("_fq", "_qparams")
    found = call_function(gm.graph, dynamic_qparams, (first_argument(node),), wanted, node, name)
    parts = METHODS[str(spec.method)].choose(torch.ones(1, 1), spec.number_format, spec.scale)
    grid: dict[str, Node | None] = dict.fromkeys(QParams._fields)
    for number, (part, value) in enumerate(parts._asdict().items()):
        if value is not None:
            grid[part] = read = call_function(gm.graph, operator.getitem, (found, number), {}, node, f"{name}_{part}")
            copy_origin(node, read)
    inputs = [grid["scale"], grid["zero_point"], None, None, grid["inverse"]]
    while inputs[-1] is None:
        inputs.pop()
    return inputs, [grid["scale"], grid["zero_point"]]


def _grids(gm: GraphModule, fq: FakeQuant, node: Node, dtype: torch.dtype) -> tuple[list[Node | None], list[Node | None]]:
    """Write an activation's constants: those that make its codes, and those that say what they stand for."""
    if fq.method.is_dynamic:
        return [], []
    path, encoding, decoding = str(node.target), fq.method.encoding(), fq.decoding()
    inputs = [_constant(gm, f"{path}_{name}", value, dtype, node) for name, value in encoding._asdict().items()]
    while inputs[-1] is None:
        inputs.pop()
    if _same(decoding, Decoding(encoding.scale, encoding.zero_point)):
        return inputs, inputs[:2]
    return inputs, _constants(gm, f"{path}_output", decoding, dtype, node)


@torch.no_grad()
def lower_biases(gm: GraphModule) -> None:
    """Hold the bias of every layer with integer weight and input as int32, in the units of its accumulators.

    The scale is that of the input times that of the weight, so that integer hardware adds the codes as they are. Biases
    are rounded to it: the outputs are no longer those of ``gm.eval()`` to the last bit.
    """
    for node in list(gm.graph.nodes):
        described = operator_of(node)
        if described is None or "weight" not in described.weights or "bias" not in described.parameters:
            continue
        bias = tensor_of(gm, operand(node, "bias"))
        scale = _accumulator_scale(gm, operand(node, "input"), operand(node, "weight"))
        if bias is None or scale is None or scale.numel() not in (1, bias.numel()):
            continue
        path = str(operand(node, "bias").target)
        wide = torch.promote_types(bias.dtype, torch.float32)
        scale = scale.to(wide).expand(bias.shape).clone()
        codes_path = free_path(gm, f"{path}_codes")
        register_buffer(gm, codes_path, integer_bias(bias, scale))
        read = get_attr(gm.graph, codes_path, node)
        grid = _constants(gm, path, Decoding(scale), bias.dtype, node)
        value = _dequantized(gm, read, grid, {"bits": 32}, bias.dtype, node, f"{operand(node, 'bias').name}_dq")
        copy_origin(node, value)
        set_operand(node, "bias", value)


def pack_weights(gm: GraphModule) -> None:
    """Hold weight codes in as many bits as they have: packed codes -> unpack -> dequantize."""
    for node in gm.graph.find_nodes(op="call_function", target=dequantize):
        read, bits = first_argument(node), arguments(node)[1]["bits"]
        codes = tensor_of(gm, read)
        if codes is None or bits >= 8:
            continue
        path = free_path(gm, f"{read.target}_packed")
        register_buffer(gm, path, pack(codes, bits))
        settings = {"bits": bits, "signed": codes.dtype is torch.int8}
        with_shape = (get_attr(gm.graph, path, read), tuple(codes.shape))
        replace(gm, read, call_function(gm.graph, unpack, with_shape, settings, read, read.name))


def unpack_weights(gm: GraphModule) -> None:
    """Undo ``pack_weights``: one byte a code, as the graph computes with them."""
    for node in gm.graph.find_nodes(op="call_function", target=unpack):
        (read, shape), settings = arguments(node)
        packed = tensor_of(gm, read)
        assert packed is not None
        path = free_path(gm, str(read.target).removesuffix("_packed"))
        register_buffer(gm, path, unpack(packed, shape, **settings))
        replace(gm, node, get_attr(gm.graph, path, node))


def drop_unused(gm: GraphModule) -> None:
    """Erase what no lowered graph of the model reads any more: float weights, fake-quants, BatchNorms."""
    remove_dead_nodes(gm)
    if gm.meta.get("prefix"):
        return  # tensors may be shared between graphs: the outermost one decides
    graphs = [module for module in gm.modules() if isinstance(module, GraphModule)]
    used = _Used()
    for graph in graphs:
        used.add_graph(graph)
    for module in gm.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(value) not in used.tensors and not used.may_be_read(module, name):
                delattr(module, name)
    for path, module in reversed(list(gm.named_modules(remove_duplicate=False))):
        if not path or module in used.modules:
            continue
        if any(True for _ in itertools.chain(module.parameters(), module.buffers(), module.children())):
            _make_plain(gm, path, module)
        else:
            _delete(gm, path)


class _Used:
    """The tensors that graphs read, and what Python code between them may read."""

    def __init__(self) -> None:
        self.tensors: set[int] = set()
        self.python: set[str] = set()  # names of attributes that modules which stay Python read
        self.modules: set[nn.Module] = set()
        self.below_python: set[nn.Module] = set()

    def add_graph(self, gm: GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.op not in ("get_attr", "call_module"):
                continue
            value = attribute_of(gm, node)
            if isinstance(value, PythonForward):
                self.python |= names_in_forward(value.code).read
                self.modules.add(value)
            elif isinstance(value, nn.Module):
                self._add_module(value)
            elif isinstance(value, Tensor):
                self.tensors.add(id(value))

    def _add_module(self, module: nn.Module) -> None:
        """A module that a graph calls, or that its root's Python code has: all of it, but a graph inside speaks for itself."""
        self.modules.add(module)
        if isinstance(module, GraphModule):
            self.below_python.add(module)
            return
        self.python |= names_in_forward(module).read
        self.tensors |= {id(value) for value in [*module.parameters(recurse=False), *module.buffers(recurse=False)]}
        for child in module.children():
            self._add_module(child)

    def may_be_read(self, module: nn.Module, name: str) -> bool:
        """Whether Python code may ask a graph below it for a tensor, as in ``self.layer.weight.dtype``, or for all of them."""
        if module in self.below_python and (name in self.python or name in read_from_outside(module)):
            return True
        return name in module._parameters and module in self._listed

    @functools.cached_property
    def _listed(self) -> set[nn.Module]:
        """The modules whose parameters Python code may go through: ``next(self.layer.parameters()).dtype``."""
        if self.python.isdisjoint(("parameters", "named_parameters")):
            return set()
        below = {module for graph in self.below_python for module in graph.modules()}
        return below - {part for module in below if isinstance(module, FakeQuant) for part in module.modules()}


def _delete(gm: GraphModule, path: str) -> None:
    parent, _, name = path.rpartition(".")
    with contextlib.suppress(AttributeError):  # of a module at several paths it may be gone already, and what was in it
        delattr(gm.get_submodule(parent), name)


def _make_plain(gm: GraphModule, path: str, module: nn.Module) -> None:
    """Let what only holds tensors be a module without code: a Conv2d without its weight could not be called anyway."""
    holder = nn.Module().train(module.training)
    for name, parameter in module.named_parameters(recurse=False):
        holder.register_parameter(name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        holder.register_buffer(name, buffer)
    for name, child in module.named_children():
        holder.add_module(name, child)
    parent, name = parent_and_name(path)
    gm.get_submodule(parent).add_module(name, holder)


def _constant(gm: GraphModule, path: str, value: Tensor | None, dtype: torch.dtype, before: Node) -> Node | None:
    if value is None:
        return None
    free = free_path(gm, path)
    wide = torch.promote_types(dtype, torch.float32)
    register_buffer(gm, free, value.detach().to(wide).clone())
    return get_attr(gm.graph, free, before)


def _same(a: Decoding, b: Decoding) -> bool:
    """Whether two grids are equal, so that one set of constants serves both."""
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


def _constants(gm: GraphModule, path: str, decoding: Decoding, dtype: torch.dtype, before: Node) -> list[Node | None]:
    return [_constant(gm, f"{path}_{name}", value, dtype, before) for name, value in decoding._asdict().items()]


def _accumulator_scale(gm: GraphModule, source: Any, weight: Any) -> Tensor | None:
    """The step of an integer layer's accumulators, one per output channel or one; None if the layer is not integer."""
    steps = []
    for value in (source, weight):
        if not isinstance(value, Node) or value.target is not dequantize:
            return None
        step = tensor_of(gm, arguments(value)[0][1])
        assert step is not None
        steps.append(step.double().flatten())
    return steps[0] * steps[1] if steps[0].numel() == 1 else None


def _finish(
    gm: GraphModule, node: Node, codes: Node, grid: list[Node | None], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """Let the users of ``node`` read the value of the codes."""
    value = _dequantized(gm, codes, grid, settings, dtype, node, node.name.replace("_fq", "_dq"))
    copy_origin(node, value)
    replace(gm, node, value)


def _dequantized(
    gm: GraphModule,
    codes: Node,
    grid: list[Node | None],
    settings: dict[str, Any],
    dtype: torch.dtype,
    before: Node,
    name: str,
) -> Node:
    """The value of codes; ``grid`` is the scale and, if there is one, the zero point."""
    settings = dict(settings)
    if dtype != torch.promote_types(dtype, torch.float32):
        settings["dtype"] = dtype
    args = (codes, *(part for part in grid if part is not None))
    return call_function(gm.graph, dequantize, args, settings, before, name)
