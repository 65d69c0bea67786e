"""Deployed models in other tools: ONNX written from the graph, verified in ONNX Runtime; ``torch.export`` programs."""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from pege_fx._utils.files import atomic_write, path_of, path_to_read
from pege_fx.errors import ExportError, PegeWarning
from pege_fx.export.calls import has_tokens, in_order, tensors_of, try_call
from pege_fx.export.outputs import given_names
from pege_fx.export.outputs import output_names as names_of_results
from pege_fx.export.program import Exported, to_program
from pege_fx.modules.stages import graph_of, refuse_sparse
from pege_fx.numerics.functional import dequantize
from pege_fx.passes.graph import arguments
from pege_fx.training.batches import Call

if TYPE_CHECKING:
    from onnx import ModelProto

    from pege_fx.export.verify import ExportReport
    from pege_fx.export.writer import OnnxStyle

Style: TypeAlias = "Literal['qdq', 'qcdq', 'qonnx'] | OnnxStyle"
STYLES = ("qdq", "qcdq", "qonnx")
_BFLOAT16_OPSET = 22

__all__ = ["export_onnx", "to_program", "verify_export"]


def export_onnx(
    deployed: GraphModule,
    path: str | os.PathLike[str],
    example_inputs: tuple[Any, ...] | Tensor = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    style: Style = "qdq",
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> int:
    """Write a converted model as ONNX; return the file's size in bytes.

    Nodes keep the names of the converted graph, weights theirs. The file is whole or not there.

    Args:
        deployed: the result of ``pege_fx.convert``.
        path: of the file.
        example_inputs: positional arguments of ``forward``; they fix every size that is not free. None between them is left
            out of the file, numbers are fixed; equal tensors, also one tensor given twice, are inputs of their own.
        example_kwargs: keyword arguments of ``forward``.
        style: "qdq": weights of 3 and 4 bits are INT4 (from opset 21), of 2 bits INT2 (from opset 25), really packed; other
            weights and all activations are int8, activations below 8 bits with a Clip. "qcdq": int8 and Clip, for any
            runtime. "qonnx": ``Quant`` nodes that say the bits, for FINN, hls4ml and their kin; weights are stored in float.
            Or one of your own, an object as ``pege_fx.export.writer.OnnxStyle`` describes it.
        opset: version of the operators, from 17; by default 17, for "qdq" 21, or 25 if something has 2 bits; for bfloat16 at
            least 22.
        dynamic_batch: leave the first dimension of every input free, and the number of tokens (the second one of whole numbers
            that have two), where the model allows it.
        dynamic_shapes: which sizes stay free beside the batch, as ``torch.export.export`` takes them; a name may stand for a
            ``Dim``, and parameters may be left out: ``{"ids": {1: "length"}, "mask": {1: "length"}}``.
        input_names: of the file's inputs, one for each tensor among the arguments; by default the names of ``forward``'s
            parameters.
        output_names: of the file's outputs; by default the keys or fields of the result, "output" for a single tensor.

    Warns if replacement was not complete (p < 1) when the model was converted, and where the model fixes the batch size, or
    chooses by it what it computes.

    Raises:
        ExportError: an unknown style or opset; a model that was not converted; an operator that has no mapping (node,
            operator and line are named); a model that writes into a buffer or an argument, which a file can not; a size that
            is to be free and that the model fixes or chooses by; names that do not fit; a file that can not be written.
        InputError: example inputs that do not fit the model.

    >>> import tempfile
    >>> import torch
    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> deployed = pege_fx.convert(gm)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = export_onnx(deployed, f"{folder}/model.onnx", (torch.randn(1, 4),))
    ...     verify_export(deployed, f"{folder}/model.onnx", [torch.randn(8, 4)]).ok
    True
    """
    found = _style_of(style)
    target = path_of(path)
    deployed = graph_of(deployed, "converted", error=ExportError)
    refuse_sparse(deployed, ExportError, made_dense=True)
    positional = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    call = in_order(deployed, (positional, dict(example_kwargs or {})))
    outputs = names_of_results(try_call(deployed, call))
    inputs = None if input_names is None else given_names("input_names", input_names, len(tensors_of(call)))
    outputs = outputs if output_names is None else given_names("output_names", output_names, len(outputs), inputs or ())
    chosen = _opset(opset, found, deployed)
    if (rate := deployed.meta.get("replacement", 1.0)) < 1.0:
        warnings.warn(
            f"the model was converted at p = {rate:.3f}, before its training was finished; it is deployed fully quantized.",
            PegeWarning,
            stacklevel=2,
        )
    sizes = {"dynamic_batch": dynamic_batch, "dynamic_shapes": dynamic_shapes}
    model, notes = _written(deployed, call, sizes, inputs, outputs, chosen, found)
    for note in notes:
        warnings.warn(note, PegeWarning, stacklevel=2)
    with atomic_write(target) as temporary:
        return temporary.write_bytes(model.SerializeToString())


def verify_export(deployed: GraphModule, path: str | os.PathLike[str], batches: Iterable[Any]) -> "ExportReport":
    """Run an exported file in ONNX Runtime and hold it against the converted model; the result prints as a verdict.

    Optimizations are off (every code is compared, and every quantization step on its own, given the model's codes) and on
    (the outputs are compared). A converted model's answers are those of ``gm.eval()``, bit for bit.

    Args:
        deployed: the model that was exported.
        path: the file that ``export_onnx`` wrote.
        batches: what ``calibrate`` takes: tensors, tuples of positional arguments (None and numbers among them, surplus ones,
            such as labels, left out) or dicts of keyword arguments.

    Returns:
        An ``ExportReport``: ``verdict`` is "exact" (every code is equal), "ties" (those that differ have an exact value on
        the border between two codes, and float rounding decided), or "different"; ``ok`` says it is not the last.

    Raises:
        ExportError: a file that is no ONNX model, or not of this model.
        InputError: no batch, or one that does not fit.

    >>> import tempfile
    >>> import torch
    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> deployed = pege_fx.convert(gm)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = export_onnx(deployed, f"{folder}/model.onnx", (torch.randn(1, 4),), style="qcdq")
    ...     report = verify_export(deployed, f"{folder}/model.onnx", [torch.randn(8, 4)])
    >>> report.verdict in ("exact", "ties")
    True
    """
    need_onnx()
    from pege_fx.export.verify import verify

    return verify(graph_of(deployed, "converted", error=ExportError), path_to_read(path, ExportError), batches)


def need_onnx() -> None:
    """Raise ``ExportError`` if the packages of the extra ``export`` are not there."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{' and '.join(missing)} not found: pip install 'pege_fx[export]'.")


def _written(
    deployed: GraphModule,
    call: Call,
    sizes: dict[str, Any],
    inputs: list[str] | None,
    outputs: list[str],
    opset: int,
    style: "OnnxStyle",
) -> tuple["ModelProto", list[str]]:
    """Return the model in ONNX, with its number of tokens free where everything allows it, and what a user should know."""
    from pege_fx.export.model import build

    def write(free_lengths: bool) -> tuple["ModelProto", list[str]]:
        exported = Exported(deployed, call, "pege_fx", **sizes, free_lengths=free_lengths, flat=True)
        return build(exported, inputs, outputs, opset, style), exported.notes

    if sizes["dynamic_batch"] and sizes["dynamic_shapes"] is None and has_tokens(call):
        with contextlib.suppress(ExportError):
            return write(free_lengths=True)
    return write(free_lengths=False)


def _style_of(style: Any) -> "OnnxStyle":
    if isinstance(style, str) and style not in STYLES:
        raise ExportError(f'style={style!r}: give "qdq", "qcdq" or "qonnx".')
    need_onnx()
    from pege_fx.export.qonnx import QONNX
    from pege_fx.export.styles import QCDQ, QDQ

    if not isinstance(style, str):
        if missing := [
            name for name in dir(QDQ) if not name.startswith("_") and not hasattr(style, name) and hasattr(QONNX, name)
        ]:
            raise ExportError(f"style={style!r} has no {', '.join(missing)}: see pege_fx.export.writer.OnnxStyle.")
        own: OnnxStyle = style
        return own
    known: dict[str, OnnxStyle] = {known.name: known for known in (QDQ, QCDQ, QONNX)}
    return known[style]


def _opset(opset: int | None, style: "OnnxStyle", deployed: GraphModule) -> int:
    import onnx

    from pege_fx.export.styles import MIN_OPSET

    newest = onnx.defs.onnx_opset_version()
    in_bfloat16 = any(value.dtype is torch.bfloat16 for value in (*deployed.parameters(), *deployed.buffers()))
    if opset is None:
        usual = style.default_opset(widths_of(deployed))
        return max(usual, _BFLOAT16_OPSET) if in_bfloat16 else usual
    if isinstance(opset, bool) or not isinstance(opset, int) or not MIN_OPSET <= opset <= newest:
        raise ExportError(f"opset={opset!r}: give a whole number from {MIN_OPSET} to {newest}, what the installed onnx knows.")
    if in_bfloat16 and opset < _BFLOAT16_OPSET:
        raise ExportError(
            f"opset={opset}: ONNX has convolutions and the like in bfloat16 from opset {_BFLOAT16_OPSET} on.\n"
            "  leave opset out, or export the model in float32: deployed.float()."
        )
    return opset


def widths_of(deployed: GraphModule) -> set[int]:
    """Return the bits of the codes of a converted model."""
    graphs = [module for module in deployed.modules() if isinstance(module, GraphModule)]
    nodes = [node for gm in graphs for node in gm.graph.find_nodes(op="call_function", target=dequantize)]
    return {int(arguments(node)[1]["bits"]) for node in nodes}
