"""Quantization-aware training with progressive element-wise gradient estimation, as a torch.fx compiler pass.

gm = pege_fx.prepare(model, "W2A2", example_inputs=(x,))
scheduler = pege_fx.PEGEScheduler(gm, total_steps=epochs)
...                                  # an ordinary training loop, scheduler.step() once per epoch
deployed = pege_fx.convert(gm)
"""

from pege_fx import curves, functional, passes
from pege_fx.api import convert, convert_passes, explain, prepare, prepare_passes, trace_passes
from pege_fx.coverage import Coverage
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
from pege_fx.diff import Diff, PassTrace, diff
from pege_fx.errors import (
    CheckpointError,
    ConvertError,
    ExportError,
    FoldError,
    InputError,
    ModelError,
    OutputError,
    PegeError,
    PegeWarning,
    PolicyError,
    ScheduleError,
    SpecError,
    TraceError,
    VerifyError,
)
from pege_fx.fake_quant import FakeQuant, fake_quants
from pege_fx.functional import Estimator
from pege_fx.inspection import Explanation, Summary, summary
from pege_fx.listing import Listing
from pege_fx.policy import QuantPolicy, Rule
from pege_fx.quantizers import ForwardMethod, Statistics
from pege_fx.scheduler import GroupCurves, PEGEScheduler
from pege_fx.sensitivity import Sensitivity, sensitivity
from pege_fx.size import SizeReport, size_report
from pege_fx.spec import QuantSpec
from pege_fx.telemetry import CSVWriter, Telemetry, TensorBoardWriter, read_history
from pege_fx.training import calibrate, discretization_loss, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "CSVWriter",
    "CheckpointError",
    "Constant",
    "ConvertError",
    "Cosine",
    "Coverage",
    "Curve",
    "Diff",
    "Estimator",
    "Explanation",
    "Exponential",
    "ExportError",
    "FakeQuant",
    "FoldError",
    "ForwardMethod",
    "GroupCurves",
    "InputError",
    "Linear",
    "Listing",
    "LogReplacement",
    "Logarithmic",
    "ModelError",
    "OutputError",
    "PEGEScheduler",
    "PassTrace",
    "PegeError",
    "PegeWarning",
    "PolicyError",
    "QuantPolicy",
    "QuantSpec",
    "RampReplacement",
    "Rule",
    "ScheduleError",
    "Sensitivity",
    "SizeReport",
    "SpecError",
    "Statistics",
    "Step",
    "Summary",
    "Telemetry",
    "TensorBoardWriter",
    "TraceError",
    "VerifyError",
    "calibrate",
    "convert",
    "convert_passes",
    "curves",
    "diff",
    "discretization_loss",
    "explain",
    "fake_quants",
    "functional",
    "parameter_groups",
    "passes",
    "prepare",
    "prepare_passes",
    "read_history",
    "sensitivity",
    "size_report",
    "summary",
    "trace_passes",
]
