"""An exported file held against the model it was made from: code by code, with every difference explained.

Three runs of ONNX Runtime answer three questions. As it is, without optimizations: where do codes part first? Without
optimizations and with every quantization step given the codes of the model: is each step right on its own, and if a code
differs, does its exact value (computed in float64) lie on the border between two codes? As it is, with all optimizations:
what will a user see?
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from pege_fx.errors import InputError
from pege_fx.export.calls import in_order, shapes_of, tensors_of
from pege_fx.export.runs import FORCED, Array, Reference, Sessions, as_array
from pege_fx.training.batches import Call, as_arguments, each_batch

TIE = 0.01  # steps: how far float32 may be from the border between two codes
SLACK = 8  # times the rounding of the model itself: how far others that sum in another order may be from it


@dataclass
class StepCheck:
    """One quantization step: how many codes were computed from the model's own codes, how many differ, and by how much.

    ``excess`` is the largest distance, in steps, between the exact value and the range that rounds to the code that
    ONNX Runtime gave: nearly 0 for a tie, infinite where it gave NaN. ``tolerance`` is how far that may be: what float32 needs,
    or in half precision eight times what the model itself is away from the exact value. ``undefined`` codes are those of NaN,
    for which none is right; the file has to choose as the model does.
    """

    name: str
    count: int = 0
    differing: int = 0
    excess: float = 0.0
    tolerance: float = TIE
    undefined: int = 0

    @property
    def is_tie(self) -> bool:
        """Whether float rounding decided every code that differs."""
        return self.excess <= self.tolerance


@dataclass
class Run:
    """Outputs of ONNX Runtime against the model's.

    Attributes:
        steps: largest difference, in units of the last quantization step (absolute if there is none).
        equal_top1: samples whose largest output (along dimension 1) is the same, of ``samples``.
        first: the first quantized node whose codes part, "" if none does; of an optimized run, looked for where outputs part.
        parted: share of codes that differ there.
        not_finite: outputs that are NaN or infinite on one side and not the same on the other.
    """

    steps: float = 0.0
    equal_top1: int = 0
    samples: int = 0
    first: str = ""
    parted: float = 0.0
    not_finite: int = 0

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
        rounding: what float rounding does to the model's own outputs: how far they are from float64, in the same units.
        optimizer_steps: largest difference that the optimizer makes without a tie that explains it, in the same units.
        misshapen: what has another shape than the model's, and both shapes; "" if nothing has.
        widened: the file is in bfloat16, and ONNX Runtime computed it in float32.
    """

    samples: int = 0
    plain: Run = field(default_factory=Run)
    optimized: Run = field(default_factory=Run)
    checks: dict[str, StepCheck] = field(default_factory=dict)
    output_steps: float = 0.0
    rounding: float = 0.0
    optimizer_steps: float = 0.0
    misshapen: str = ""
    widened: bool = False

    @property
    def tolerance(self) -> float:
        """What outputs may differ by, in units of the last step, and still be the model's."""
        return max(TIE, SLACK * self.rounding)

    @property
    def verdict(self) -> Literal["exact", "ties", "different"]:
        """ "exact": every code is equal. "ties": those that differ lie on a border, within float rounding. Else "different".

        NaN and infinity are equal to themselves and to nothing else.
        """
        if self.misshapen or self._worst_step() or self.plain.not_finite or self.optimized.not_finite:
            return "different"
        if max(self.output_steps, self.optimizer_steps) > self.tolerance:
            return "different"
        return "ties" if self.plain.first or self.optimized.first else "exact"

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
        if undefined := sum(check.undefined for check in self.checks.values()):
            lines.append(f"{undefined} values are NaN where they are quantized: no code is right for them")
        if self.widened:
            lines.append("ONNX Runtime has no kernels for bfloat16 on a CPU: it computed the file in float32")
        for name, run in (("off", self.plain), ("on", self.optimized)):
            lines.append(
                f"ONNX Runtime, optimizations {name}: largest difference {run.steps:.2g} steps, top-1 equal {run.top1:.2%}"
                + (f", parts first at {run.first} ({run.parted:.1e} of its codes)" if run.first else "")
                + (f", {run.not_finite:,} outputs are NaN or infinite on one side alone" if run.not_finite else "")
            )
        meaning = {
            "exact": "exact: every code is the model's.",
            "ties": "ties: float rounding decides codes that lie on a border; nothing else differs.",
            "different": f"different: {self._worst()} is not what the model computes.",
        }
        return "\n".join([*lines, meaning[self.verdict]])

    def _worst(self) -> str:
        if self.misshapen:
            return self.misshapen
        if step := self._worst_step():
            return step
        if self.output_steps > self.tolerance or self.plain.not_finite:
            return "the output"
        return "what the optimizer made of the file"

    def _worst_step(self) -> str:
        """The step whose codes are furthest from what they may be, "" if all are as near as rounding allows."""
        wrong = [check for check in self.checks.values() if not check.is_tie]
        return max(wrong, key=lambda check: check.excess).name if wrong else ""


def verify(deployed: GraphModule, path: Path, batches: Iterable[Any]) -> ExportReport:
    """See ``pege_fx.verify_export``."""
    sessions = Sessions(path, deployed)
    report = ExportReport(widened=sessions.widened)
    for batch in each_batch(batches, "verify_export"):
        _compare(sessions, _call_of(deployed, batch, len(sessions.inputs)), report)
    return report


def _call_of(gm: GraphModule, batch: Any, count: int) -> Call:
    """Return the call of ``forward`` that a batch stands for; its tensors have to be the inputs of the file."""
    call = in_order(gm, as_arguments(gm, batch))
    if (given := len(tensors_of(call))) != count:
        raise InputError(
            f"a batch has {given} values, the model takes {count} tensors: "
            "give what calibrate takes, with the arguments that the model was exported with."
        )
    return call


# --- the comparison --------------------------------------------------------------------------------------------


def _compare(sessions: Sessions, call: Call, report: ExportReport) -> None:
    leaves, shapes = tensors_of(call), shapes_of(call)
    try:
        reference = sessions.model(call)
    except Exception as error:
        raise InputError(f"the model fails on inputs of shapes {shapes}: {type(error).__name__}: {error}") from error
    names = [name for name in reference.values if name in sessions.names]  # in the order of execution
    scales = sessions.model.scales
    unit = abs(scales[names[-1]]) if names else 1.0
    feed = sessions.feed(leaves)
    try:
        plain = sessions.plain.run([*sessions.outputs, *names], feed)
        optimized = sessions.optimized.run(sessions.outputs, feed)
        given = feed | {name: as_array(reference.values[name]) for name in names}
        forced = sessions.forced.run([*sessions.outputs, *(name + FORCED for name in names)], given)
    except Exception as error:
        raise InputError(f"ONNX Runtime fails on inputs of shapes {shapes}: {error}") from error
    count = len(sessions.outputs)
    report.samples += leaves[0].shape[0] if leaves and leaves[0].ndim else 1
    if count != len(reference.outputs):
        report.misshapen = f"{count} outputs of the file, for the model's {len(reference.outputs)},"
        return
    models = [*reference.outputs, *(reference.values[name] for name in names)]
    for found in (plain, forced, optimized):
        report.misshapen = report.misshapen or _other_shape([*sessions.outputs, *names], found, models)
    if report.misshapen:
        return
    _add_outputs(report.plain, plain[:count], reference.outputs, unit)
    _add_outputs(report.optimized, optimized, reference.outputs, unit)
    report.rounding = max(report.rounding, _rounding(reference, unit))
    report.output_steps = max(report.output_steps, _largest(forced[:count], reference.outputs, unit))
    _find_first(report.plain, names, plain[count:], reference, scales)
    for name, computed in zip(names, forced[count:], strict=True):
        _check_step(report.checks.setdefault(name, StepCheck(name)), computed, reference, scales[name])
    if (moved := _largest(optimized, reference.outputs, unit)) > report.tolerance:
        codes = sessions.optimized_plain.run(names, feed) if names else []
        if not _is_a_tie(report.optimized, names, codes, reference, scales) and not report.plain.first:
            report.optimizer_steps = max(report.optimizer_steps, moved)


def _other_shape(names: list[str], computed: list[Array], expected: list[Tensor]) -> str:
    """The first result whose shape is not the model's, with both; "" if all are."""
    for name, a, b in zip(names, computed, expected, strict=False):
        if a.shape != tuple(b.shape):
            return f"{name} of shape {a.shape}, for the model's {tuple(b.shape)},"
    return ""


def _is_a_tie(run: Run, names: list[str], computed: list[Array], reference: Reference, scales: Mapping[str, float]) -> bool:
    """Note the first step whose codes part, all before it being the model's; tell whether it is only a tie."""
    found = Run()
    _find_first(found, names, computed, reference, scales)
    if not found.first:
        return False
    check = StepCheck(found.first)
    _check_step(check, computed[names.index(found.first)], reference, scales[found.first])
    if not run.first:
        run.first, run.parted = found.first, found.parted
    return check.is_tie


def _largest(computed: list[Array], expected: list[Tensor], unit: float) -> float:
    differences = [_difference(a.astype(np.float64), b.double().numpy()) for a, b in zip(computed, expected, strict=True)]
    return max((float(d.max()) / unit for d in differences if d.size), default=0.0)


def _rounding(reference: Reference, unit: float) -> float:
    """How far finite outputs are from float64, and at least one unit in the last place of the largest, in steps."""
    found = 0.0
    for output, exact in zip(reference.outputs, reference.exact, strict=True):
        finite = output.isfinite() & exact.isfinite()
        if output.is_floating_point() and finite.any():
            error = (output.double() - exact)[finite].abs().max()
            last_place = exact[finite].abs().max() * torch.finfo(output.dtype).eps
            found = max(found, float(torch.maximum(error, last_place)) / unit)
    return found


def _difference(a: Array, b: Array) -> Array:
    """How far apart values are; two NaN, or the same infinity, not at all, NaN and a number infinitely far."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, _or_infinite(np.abs(a - b)))


def _not_finite(a: Array, b: Array) -> int:
    """How many values are NaN or infinite on one side, and something else on the other."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return int((~np.isfinite(a) | ~np.isfinite(b))[_difference(a, b) != 0].sum())


def _add_outputs(run: Run, computed: list[Array], expected: list[Tensor], unit: float) -> None:
    run.steps = max(run.steps, _largest(computed, expected, unit))
    run.not_finite += sum(_not_finite(a, as_array(b)) for a, b in zip(computed, expected, strict=True))
    if expected and expected[0].ndim > 1:
        same = computed[0].argmax(1) == as_array(expected[0]).argmax(1)
        run.equal_top1 += int(same.sum())
        run.samples += same.size


def _find_first(run: Run, names: list[str], computed: list[Array], reference: Reference, scales: Mapping[str, float]) -> None:
    for name, values in zip(names, computed, strict=True):
        parted = float((_code_difference(values, reference.values[name], scales[name]) != 0).mean()) if values.size else 0.0
        if parted and (not run.first or names.index(name) < names.index(run.first)):
            run.first, run.parted = name, parted
            return


def _code_difference(computed: Array, expected: Tensor, scale: float) -> Array:
    """How many codes apart values are; NaN, which is no code, is infinitely far from all."""
    return _or_infinite(np.rint((computed.astype(np.float64) - expected.double().numpy()) / scale))


def _or_infinite(distance: Array) -> Array:
    """A distance of NaN is as large as can be: comparisons with it, and ``max``, would pass over it."""
    return np.where(np.isnan(distance), np.inf, distance)


def _check_step(check: StepCheck, computed: Array, reference: Reference, scale: float) -> None:
    """Compare codes computed from the model's own; a code that differs has to be as near as float rounding allows."""
    difference = _code_difference(computed, reference.values[check.name], scale)
    differs = difference != 0
    check.tolerance = max(check.tolerance, SLACK * reference.rounding.get(check.name, 0.0))
    check.undefined += int(reference.positions[check.name].isnan().sum())
    check.count += difference.size
    check.differing += int(differs.sum())
    if not differs.any():
        return
    given = reference.codes[check.name].numpy()[differs] + difference[differs]
    position = reference.positions[check.name].numpy()[differs]
    check.excess = max(check.excess, float(_or_infinite(np.abs(given - position) - 0.5).max()))
