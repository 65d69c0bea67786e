"""Quantization-aware training with progressive element-wise gradient estimation, as a torch.fx compiler pass.

gm = pege_fx.prepare(model, "W2A2", example_inputs=(x,))
scheduler = pege_fx.PEGEScheduler(gm, total_steps=epochs)
...                                  # an ordinary training loop, scheduler.step() once per epoch
deployed = pege_fx.convert(gm)
"""

from pege_fx import curves, functional, passes
from pege_fx.api import convert, convert_passes, explain, prepare, prepare_passes
from pege_fx.curves import (
    Constant,
    Cosine,
    Curve,
    Exponential,
    Linear,
    Logarithmic,
    LogReplacement,
    RampReplacement,
    Step,
)
from pege_fx.errors import (
    CheckpointError,
    ConvertError,
    ExportError,
    FoldError,
    InputError,
    ModelError,
    PegeError,
    PegeWarning,
    PolicyError,
    ScheduleError,
    SpecError,
    TraceError,
    VerifyError,
)
from pege_fx.export import export_onnx, to_program, verify_export
from pege_fx.fake_quant import FakeQuant, fake_quants
from pege_fx.functional import Estimator
from pege_fx.inspection import Explanation, SizeReport, size_report, summary
from pege_fx.integer import IntegerCoverage, integer_coverage, integer_engine
from pege_fx.policy import QuantPolicy, Rule
from pege_fx.quantizers import ForwardMethod, Statistics
from pege_fx.scheduler import GroupCurves, PEGEScheduler
from pege_fx.spec import QuantSpec
from pege_fx.storage import load_deployed, save_deployed
from pege_fx.training import calibrate, discretization_loss, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Constant",
    "ConvertError",
    "Cosine",
    "Curve",
    "Estimator",
    "Explanation",
    "Exponential",
    "ExportError",
    "FakeQuant",
    "FoldError",
    "ForwardMethod",
    "GroupCurves",
    "InputError",
    "IntegerCoverage",
    "Linear",
    "LogReplacement",
    "Logarithmic",
    "ModelError",
    "PEGEScheduler",
    "PegeError",
    "PegeWarning",
    "PolicyError",
    "QuantPolicy",
    "QuantSpec",
    "RampReplacement",
    "Rule",
    "ScheduleError",
    "SizeReport",
    "SpecError",
    "Statistics",
    "Step",
    "TraceError",
    "VerifyError",
    "calibrate",
    "convert",
    "convert_passes",
    "curves",
    "discretization_loss",
    "explain",
    "export_onnx",
    "fake_quants",
    "functional",
    "integer_coverage",
    "integer_engine",
    "load_deployed",
    "parameter_groups",
    "passes",
    "prepare",
    "prepare_passes",
    "save_deployed",
    "size_report",
    "summary",
    "to_program",
    "verify_export",
]
