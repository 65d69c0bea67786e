"""An exported file held against the model it was made from: code by code, with every difference explained.

Three runs of ONNX Runtime answer three questions. As it is, without optimizations: where do codes part first? Without
optimizations and with every quantization step given the codes of the model: is each step right on its own, and if a code
differs, does its exact value (computed in float64) lie on the border between two codes? As it is, with all optimizations:
what will a user see?
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor
from torch.fx import GraphModule

from pege_fx.errors import ExportError, InputError
from pege_fx.export.program import Step, stepped, steps_of
from pege_fx.functional import dequantize, quantize
from pege_fx.passes.graph import arguments
from pege_fx.spec import bounds_of

TIE = 0.01  # steps: how far float32 may be from the border between two codes
_FORCED = "__computed"
Array = NDArray[Any]


@dataclass
class StepCheck:
    """One quantization step: how many codes were computed from the model's own codes, how many differ, and by how much.

    ``excess`` is the largest distance, in steps, between the exact value and the range that rounds to the code that
    ONNX Runtime gave; nearly 0 for a tie.
    """

    name: str
    count: int = 0
    differing: int = 0
    excess: float = 0.0


@dataclass
class Run:
    """Outputs of ONNX Runtime against the model's.

    Attributes:
        steps: largest difference, in units of the last quantization step (absolute if there is none).
        equal_top1: samples whose largest output (along dimension 1) is the same, of ``samples``.
        first: the first quantized node whose codes part, "" if none does; not known for an optimized run.
        parted: share of codes that differ there.
    """

    steps: float = 0.0
    equal_top1: int = 0
    samples: int = 0
    first: str = ""
    parted: float = 0.0

    @property
    def top1(self) -> float:
        return self.equal_top1 / max(self.samples, 1)


@dataclass
class ExportReport:
    """What ``verify_export`` found; prints as a few lines that end with the verdict.

    Attributes:
        plain: ONNX Runtime without optimizations.
        optimized: ONNX Runtime with all of them.
        checks: every quantization step on its own, given the model's codes.
        output_steps: largest difference of the outputs, given the model's codes, in units of the last step.
    """

    samples: int = 0
    plain: Run = field(default_factory=Run)
    optimized: Run = field(default_factory=Run)
    checks: dict[str, StepCheck] = field(default_factory=dict)
    output_steps: float = 0.0

    @property
    def verdict(self) -> Literal["exact", "ties", "different"]:
        """ "exact": every code is equal. "ties": those that differ lie on a border, within float rounding. Else "different"."""
        worst = max((check.excess for check in self.checks.values()), default=0.0)
        if worst > TIE or self.output_steps > TIE:
            return "different"
        return "ties" if self.plain.first else "exact"

    @property
    def ok(self) -> bool:
        return self.verdict != "different"

    def __str__(self) -> str:
        differing = [check for check in self.checks.values() if check.differing]
        codes = sum(check.count for check in self.checks.values())
        lines = [
            f"{self.samples} samples, {len(self.checks)} quantization steps, {codes:,} codes",
            f"given the model's codes: {len(self.checks) - len(differing)} steps exact, "
            f"{sum(check.differing for check in differing)} codes differ in {len(differing)} steps"
            + (f", at most {max(c.excess for c in differing):.1e} steps behind the border" if differing else ""),
        ]
        for name, run in (("off", self.plain), ("on", self.optimized)):
            lines.append(
                f"ONNX Runtime, optimizations {name}: largest difference {run.steps:.2g} steps, top-1 equal {run.top1:.2%}"
                + (f", parts first at {run.first} ({run.parted:.2%} of its codes)" if run.first else "")
            )
        meaning = {
            "exact": "exact: every code is the model's.",
            "ties": "ties: float rounding decides codes that lie on a border; nothing else differs.",
            "different": f"different: {self._worst()} is not what the model computes.",
        }
        return "\n".join([*lines, meaning[self.verdict]])

    def _worst(self) -> str:
        worst = max(self.checks.values(), key=lambda check: check.excess, default=None)
        return worst.name if worst is not None and worst.excess > TIE else "the output"


def verify(deployed: GraphModule, path: str | os.PathLike[str], batches: Iterable[Any]) -> ExportReport:
    """See ``pege_fx.verify_export``."""
    sessions = _Sessions(Path(path), deployed)
    report = ExportReport()
    for batch in batches:
        _compare(sessions, _arguments(batch, len(sessions.inputs)), report)
    if not report.samples:
        raise InputError("verify_export got no batch: give at least one.")
    return report


def _arguments(batch: Any, count: int) -> tuple[Tensor, ...]:
    """The tensors of a batch; surplus ones, such as labels, are left out."""
    values = [batch] if isinstance(batch, Tensor) else list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    if len(values) < count or not all(isinstance(value, Tensor) for value in values[:count]):
        raise InputError(f"a batch has {len(values)} values, the model takes {count} tensors: give tensors or tuples of them.")
    return tuple(values[:count])


# --- the model, step by step -----------------------------------------------------------------------------------


@dataclass
class _Reference:
    """What the converted graph computes: its outputs, and of every quantized node its value, codes and exact position."""

    outputs: list[Tensor]
    values: dict[str, Tensor]
    codes: dict[str, Tensor]
    positions: dict[str, Tensor]


class _Model:
    """The converted graph, in float32 and in float64, with its quantization steps in sight."""

    def __init__(self, deployed: GraphModule) -> None:
        self.plain = stepped(deployed)
        self.exact = stepped(deployed, {dequantize: _wide_dequantize}).double()
        self.scales: dict[str, float] = {}
        self._source = _sources(deployed)

    def __call__(self, args: tuple[Tensor, ...]) -> _Reference:
        codes: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        positions: dict[str, Tensor] = {}

        def keep_codes(name: str, args: Any, kwargs: Any, result: Any) -> None:
            codes[name] = result

        def keep_values(name: str, args: Any, kwargs: Any, result: Any) -> None:
            if name in self._source:
                values[name] = result
                self.scales[name] = float(args[1])

        def keep_positions(name: str, args: Any, kwargs: Any, result: Any) -> Tensor:
            positions[name] = _position(*args, **kwargs)
            return codes[name]

        with torch.no_grad():
            with _Hooks(self.plain, {quantize: keep_codes, dequantize: keep_values}):
                outputs = flat_tensors(self.plain(*args))
            with _Hooks(self.exact, {quantize: keep_positions}):
                self.exact(*(x.double() if x.is_floating_point() else x for x in args))
        codes, positions = ({name: found[self._source[name]] for name in values} for found in (codes, positions))
        return _Reference(outputs, values, codes, positions)


def _wide_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, **settings: Any) -> Tensor:
    return dequantize(codes, scale, zero_point, bits=settings["bits"])


def _position(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, lower: Tensor | None = None, width: Tensor | None = None,
    *, bits: int, signed: bool, narrow: bool = False,
) -> Tensor:  # fmt: skip
    """Where x lies among the codes, before rounding."""
    if lower is not None and width is not None:
        x = (x - lower) / width
    place = x / scale if zero_point is None else x / scale + zero_point
    return place.clamp(*bounds_of(bits, signed=signed, narrow=narrow))


def _sources(deployed: GraphModule) -> dict[str, str]:
    """Activations: each dequantize node and the quantize node it reads, with their graph's path before both."""
    found = {}
    for path, gm in deployed.named_modules():
        if isinstance(gm, GraphModule):
            prefix = f"{path}." if path else ""
            for node in gm.graph.find_nodes(op="call_function", target=dequantize):
                source = arguments(node)[0][0]
                if source.target is quantize:
                    found[f"{prefix}{node.name}"] = f"{prefix}{source.name}"
    return found


class _Hooks:
    """Calls back with every result of some functions' steps; what a callback returns takes the result's place."""

    def __init__(self, model: GraphModule, callbacks: Mapping[Any, Callable[[str, Any, Any, Any], Any]]) -> None:
        self.model, self.callbacks = model, callbacks

    def __enter__(self) -> None:
        self.handles = [
            step.register_forward_hook(_named(name, self.callbacks[step.function]), with_kwargs=True)
            for name, step in steps_of(self.model, tuple(self.callbacks))
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _named(name: str, callback: Callable[[str, Any, Any, Any], Any]) -> Callable[[Step, Any, Any, Any], Any]:
    return lambda module, args, kwargs, result: callback(name, args, kwargs, result)


def flat_tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result in the order in which ``export_onnx`` names them."""
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for value in values for tensor in flat_tensors(value)]


# --- ONNX Runtime ----------------------------------------------------------------------------------------------


class _Sessions:
    """The exported file in ONNX Runtime: plain with its codes exposed, with its codes given, and optimized."""

    def __init__(self, path: Path, deployed: GraphModule) -> None:
        self.model = _Model(deployed)
        try:
            proto = onnx.load(path)
        except Exception as error:
            raise ExportError(f"{path} can not be read as ONNX: {type(error).__name__}: {error}") from error
        produced = {name for node in proto.graph.node for name in node.output}
        sources = _sources(deployed)
        self.names = [name for name in sources if name in produced]
        if sources and not self.names:
            raise ExportError(f"{path} is not an export of this model: none of its nodes is called as the model's are.")
        self.inputs = [value.name for value in proto.graph.input]
        self.outputs = [value.name for value in proto.graph.output]
        self.plain = _session(_exposed(proto, self.names), optimized=False)
        self.forced = _session(_forced(proto, self.names), optimized=False)
        self.optimized = _session(proto, optimized=True)

    def feed(self, args: tuple[Tensor, ...]) -> dict[str, Array]:
        return {name: x.detach().numpy() for name, x in zip(self.inputs, args, strict=True)}


def _session(proto: onnx.ModelProto, *, optimized: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _exposed(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """The model with the values of its codes as outputs too."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    made.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return made


def _forced(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """The model with the values of its codes as inputs; what it computes for them are outputs."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    types = {value.name: value.type for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    for node in made.graph.node:
        for i, name in enumerate(node.output):
            if name in names:
                node.output[i] = name + _FORCED
    for name in names:
        kind = types[name].tensor_type.elem_type
        made.graph.input.append(helper.make_tensor_value_info(name, kind, None))
        made.graph.output.append(helper.make_empty_tensor_value_info(name + _FORCED))
    return made


# --- the comparison --------------------------------------------------------------------------------------------


def _compare(sessions: _Sessions, args: tuple[Tensor, ...], report: ExportReport) -> None:
    shapes = [tuple(x.shape) for x in args]
    try:
        reference = sessions.model(args)
    except Exception as error:
        raise InputError(f"the model fails on inputs of shapes {shapes}: {type(error).__name__}: {error}") from error
    names = [name for name in reference.values if name in sessions.names]  # in the order of execution
    scales = sessions.model.scales
    unit = abs(scales[names[-1]]) if names else 1.0
    feed = sessions.feed(args)
    try:
        plain = sessions.plain.run([*sessions.outputs, *names], feed)
        optimized = sessions.optimized.run(sessions.outputs, feed)
        given = feed | {name: reference.values[name].numpy() for name in names}
        forced = sessions.forced.run([*sessions.outputs, *(name + _FORCED for name in names)], given)
    except Exception as error:
        raise InputError(f"ONNX Runtime fails on inputs of shapes {shapes}: {error}") from error
    count = len(sessions.outputs)
    report.samples += args[0].shape[0] if args[0].ndim else 1
    _add_outputs(report.plain, plain[:count], reference.outputs, unit)
    _add_outputs(report.optimized, optimized, reference.outputs, unit)
    report.output_steps = max(report.output_steps, _largest(forced[:count], reference.outputs, unit))
    _find_first(report.plain, names, plain[count:], reference, scales)
    for name, computed in zip(names, forced[count:], strict=True):
        _check_step(report.checks.setdefault(name, StepCheck(name)), computed, reference, scales[name])


def _largest(computed: list[Array], expected: list[Tensor], unit: float) -> float:
    differences = [np.abs(a.astype(np.float64) - b.double().numpy()) for a, b in zip(computed, expected, strict=True)]
    return max((float(d.max()) / unit for d in differences if d.size), default=0.0)


def _add_outputs(run: Run, computed: list[Array], expected: list[Tensor], unit: float) -> None:
    run.steps = max(run.steps, _largest(computed, expected, unit))
    if expected and expected[0].ndim > 1:
        same = computed[0].argmax(1) == expected[0].argmax(1).numpy()
        run.equal_top1 += int(same.sum())
        run.samples += same.size


def _find_first(run: Run, names: list[str], computed: list[Array], reference: _Reference, scales: Mapping[str, float]) -> None:
    for name, values in zip(names, computed, strict=True):
        parted = float((_code_difference(values, reference.values[name], scales[name]) != 0).mean()) if values.size else 0.0
        if parted and (not run.first or names.index(name) < names.index(run.first)):
            run.first, run.parted = name, parted
            return


def _code_difference(computed: Array, expected: Tensor, scale: float) -> Array:
    difference: Array = np.rint((computed.astype(np.float64) - expected.double().numpy()) / scale)
    return difference


def _check_step(check: StepCheck, computed: Array, reference: _Reference, scale: float) -> None:
    """Compare codes computed from the model's own; a code that differs has to be as near as float rounding allows."""
    difference = _code_difference(computed, reference.values[check.name], scale)
    differs = difference != 0
    check.count += difference.size
    check.differing += int(differs.sum())
    if not differs.any():
        return
    given = reference.codes[check.name].numpy()[differs] + difference[differs]
    position = reference.positions[check.name].numpy()[differs]
    check.excess = max(check.excess, float((np.abs(given - position) - 0.5).max()))
