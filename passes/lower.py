"""Lowering: fake-quants become integers with their scales, folded BatchNorms become part of weight and bias."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.batch_norm import FOLDED, BatchNorm, BiasFold, WeightFold
from pege_fx.fake_quant import FakeQuant
from pege_fx.functional import dequantize, quantize
from pege_fx.mode import PythonForward
from pege_fx.passes.graph import (
    attribute_of,
    call_function,
    calls,
    copy_origin,
    first_argument,
    free_path,
    get_attr,
    register_buffer,
    remove_dead_nodes,
    replace,
    source_of,
    tensor_of,
)
from pege_fx.quantizers import Decoding


@torch.no_grad()
def lower_weights(gm: GraphModule) -> None:
    """Hold every quantized weight as integer codes with a scale: codes -> dequantize -> operation."""
    for node, fq in calls(gm, FakeQuant):
        weight = tensor_of(gm, first_argument(node))
        if fq.site.kind != "weight" or weight is None:
            continue
        if not fq.is_calibrated:
            fq.initialize_from(weight)
        scale, zero_point = fq.decoding()
        codes = fq.codes(weight).to(torch.int8 if fq.site.spec.signed else torch.uint8)
        path = str(first_argument(node).target)
        codes_path = free_path(gm, f"{path}_codes")
        register_buffer(gm, codes_path, codes)
        read = get_attr(gm.graph, codes_path, node)
        grid = _constants(gm, path, Decoding(scale, zero_point), weight.dtype, node)
        _finish(gm, node, read, grid, fq.site.spec.bits, weight.dtype)


@torch.no_grad()
def lower_folds(gm: GraphModule) -> None:
    """Store weights and biases with their BatchNorm folded in, and drop the BatchNorms."""
    for kind in (WeightFold, BiasFold):
        for node, module in calls(gm, kind):
            source = first_argument(node)
            value = module(None if source is None else tensor_of(gm, source))
            path = free_path(gm, f"{node.target}ed")
            register_buffer(gm, path, value.clone())
            replace(gm, node, get_attr(gm.graph, path, before=node))
    for node, module in calls(gm, BatchNorm):
        if type(module) in FOLDED.values():
            replace(gm, node, first_argument(node))


@torch.no_grad()
def lower_activations(gm: GraphModule) -> None:
    """Write every quantized activation as quantize -> dequantize."""
    dtype = next((p.dtype for p in (*gm.parameters(), *gm.buffers()) if p.is_floating_point()), torch.float32)
    for node, fq in calls(gm, FakeQuant):
        spec, path = fq.site.spec, str(node.target)
        encoding = fq.method.encoding()
        inputs = [_constant(gm, f"{path}_{name}", value, dtype, node) for name, value in encoding._asdict().items()]
        while inputs[-1] is None:
            inputs.pop()
        settings: dict[str, Any] = {"bits": spec.bits, "signed": spec.signed}
        if spec.narrow:
            settings["narrow"] = True
        codes = call_function(
            gm.graph, quantize, (first_argument(node), *inputs), settings, node, node.name.replace("_fq", "_q")
        )
        copy_origin(node, codes)
        decoding = fq.decoding()
        if _same(decoding, Decoding(encoding.scale, encoding.zero_point)):
            _finish(gm, node, codes, inputs[:2], spec.bits, dtype)
        else:
            _finish(gm, node, codes, _constants(gm, f"{path}_output", decoding, dtype, node), spec.bits, dtype)


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
    for graph in graphs:
        graph.delete_all_unused_submodules()


class _Used:
    """The tensors that graphs read, and what Python code between them may read."""

    def __init__(self) -> None:
        self.tensors: set[int] = set()
        self.python = ""  # the source of modules that stay Python
        self.below_python: set[nn.Module] = set()

    def add_graph(self, gm: GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.op not in ("get_attr", "call_module"):
                continue
            value = attribute_of(gm, node)
            if isinstance(value, PythonForward):
                self.python += source_of(value.code)
            elif isinstance(value, nn.Module):
                self._add_module(value)
            elif isinstance(value, Tensor):
                self.tensors.add(id(value))

    def _add_module(self, module: nn.Module) -> None:
        """A module that a graph calls, or that its root's Python code has: all of it, but a graph inside speaks for itself."""
        if isinstance(module, GraphModule):
            self.below_python.add(module)
            return
        self.python += source_of(module)
        self.tensors |= {id(value) for value in [*module.parameters(recurse=False), *module.buffers(recurse=False)]}
        for child in module.children():
            self._add_module(child)

    def may_be_read(self, module: nn.Module, name: str) -> bool:
        """Whether Python code may ask a graph below it for a parameter, as in ``self.layer.weight.dtype``."""
        return module in self.below_python and f".{name}" in self.python


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


def _finish(gm: GraphModule, node: Node, codes: Node, grid: list[Node | None], bits: int, dtype: torch.dtype) -> None:
    """Let the users of ``node`` read the value of the codes; ``grid`` is the scale and, if there is one, the zero point."""
    settings: dict[str, Any] = {"bits": bits}
    if dtype != torch.promote_types(dtype, torch.float32):
        settings["dtype"] = dtype
    args = (codes, *(part for part in grid if part is not None))
    value = call_function(gm.graph, dequantize, args, settings, node, node.name.replace("_fq", "_dq"))
    copy_origin(node, value)
    replace(gm, node, value)
