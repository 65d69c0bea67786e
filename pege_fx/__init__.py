"""Quantization-aware training with progressive element-wise gradient estimation, as a torch.fx compiler pass.

gm = pege_fx.prepare(model, "W2A2", example_inputs=(x,))
scheduler = pege_fx.PEGEScheduler(gm, total_steps=epochs)
...                                  # an ordinary training loop, scheduler.step() once per epoch
deployed = pege_fx.convert(gm)
"""

from pege_fx import curves, dataflow, functional, passes
from pege_fx.api import convert, convert_passes, explain, prepare, prepare_passes, trace_passes
from pege_fx.checkpoint import CheckpointInfo, checkpoint_info, load, newest, save
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
from pege_fx.dataflow import to_networkx
from pege_fx.diff import Diff, PassTrace, diff
from pege_fx.distributed import shard
from pege_fx.draw import draw
from pege_fx.errors import (
    CheckpointError,
    ConvertError,
    ExportError,
    FoldError,
    InputError,
    LawError,
    ModelError,
    NonFiniteError,
    OtherCallError,
    OutputError,
    PackageError,
    PegeError,
    PegeWarning,
    PolicyError,
    ScheduleError,
    SpecError,
    TraceError,
    VerifyError,
)
from pege_fx.ewgs import update_ewgs
from pege_fx.export import export_onnx, to_program, verify_export
from pege_fx.fake_quant import FakeQuant, fake_quants
from pege_fx.functional import Estimator
from pege_fx.guard import Finding, Guard
from pege_fx.inspection import Explanation, Summary, summary
from pege_fx.integer import IntegerCoverage, integer_coverage, integer_engine
from pege_fx.listing import Listing
from pege_fx.policy import QuantPolicy, Rule
from pege_fx.quantizers import ForwardMethod, Statistics
from pege_fx.report import report
from pege_fx.scheduler import GroupCurves, PEGEScheduler
from pege_fx.sensitivity import Sensitivity, sensitivity
from pege_fx.size import SizeReport, size_report
from pege_fx.spec import QuantSpec
from pege_fx.storage import load_deployed, save_deployed
from pege_fx.telemetry import CSVWriter, Telemetry, TensorBoardWriter, read_history
from pege_fx.training import calibrate, discretization_loss, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "CSVWriter",
    "CheckpointError",
    "CheckpointInfo",
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
    "Finding",
    "FoldError",
    "ForwardMethod",
    "GroupCurves",
    "Guard",
    "InputError",
    "IntegerCoverage",
    "LawError",
    "Linear",
    "Listing",
    "LogReplacement",
    "Logarithmic",
    "ModelError",
    "NonFiniteError",
    "OtherCallError",
    "OutputError",
    "PEGEScheduler",
    "PackageError",
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
    "checkpoint_info",
    "convert",
    "convert_passes",
    "curves",
    "dataflow",
    "diff",
    "discretization_loss",
    "draw",
    "explain",
    "export_onnx",
    "fake_quants",
    "functional",
    "integer_coverage",
    "integer_engine",
    "load",
    "load_deployed",
    "newest",
    "parameter_groups",
    "passes",
    "prepare",
    "prepare_passes",
    "read_history",
    "report",
    "save",
    "save_deployed",
    "sensitivity",
    "shard",
    "size_report",
    "summary",
    "to_networkx",
    "to_program",
    "trace_passes",
    "update_ewgs",
    "verify_export",
]
