"""Quantization-aware training with progressive element-wise gradient estimation, as a torch.fx compiler pass.

gm = pege_fx.prepare(model, "W2A2", example_inputs=(x,))
scheduler = pege_fx.PEGEScheduler(gm, total_steps=epochs)
...                                  # an ordinary training loop, scheduler.step() once per epoch
deployed = pege_fx.convert(gm)
"""

from pege_fx import engines, passes
from pege_fx._utils import moved
from pege_fx._utils.listing import Listing
from pege_fx.api import convert, convert_passes, explain, prepare, prepare_passes, trace_passes
from pege_fx.engines import verify
from pege_fx.engines.integer import IntegerCoverage, integer_coverage, integer_engine
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
from pege_fx.export import export_onnx, to_program, verify_export
from pege_fx.inspection import dataflow
from pege_fx.inspection.coverage import Coverage
from pege_fx.inspection.dataflow import to_networkx
from pege_fx.inspection.diff import Diff, PassTrace, diff
from pege_fx.inspection.draw import draw
from pege_fx.inspection.report import report
from pege_fx.inspection.sensitivity import Sensitivity, sensitivity
from pege_fx.inspection.size import SizeReport, size_report
from pege_fx.inspection.summary import Explanation, Summary, summary
from pege_fx.modules.dynamic_methods import DynamicMethod
from pege_fx.modules.fake_quant import FakeQuant, fake_quants
from pege_fx.modules.forward_method import ForwardMethod, Statistics
from pege_fx.numerics import functional
from pege_fx.numerics.estimators import Estimator
from pege_fx.numerics.formats import Format, Levels, add_format
from pege_fx.numerics.functional import QParams
from pege_fx.numerics.layouts import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, ScaleLayout, add_layout
from pege_fx.numerics.spec import QuantSpec
from pege_fx.policy.rules import QuantPolicy, Rule
from pege_fx.serialization.checkpoint import checkpoint_info, load, newest, save
from pege_fx.serialization.compatibility import CheckpointInfo
from pege_fx.serialization.deployed import load_deployed, save_deployed
from pege_fx.training import curves
from pege_fx.training.calibration import calibrate, discretization_loss, parameter_groups
from pege_fx.training.curves import (
    Constant,
    Cosine,
    Curve,
    Delayed,
    Exponential,
    Linear,
    Logarithmic,
    LogReplacement,
    RampReplacement,
    Step,
)
from pege_fx.training.dampening import DecoupledLambda, dampening_loss
from pege_fx.training.ewgs import update_ewgs
from pege_fx.training.freezing import WeightFreezing
from pege_fx.training.guard import Finding, Guard
from pege_fx.training.reestimation import reestimate_batch_norm
from pege_fx.training.scheduler import GroupCurves, PEGEScheduler, plan_of
from pege_fx.training.sharding import shard
from pege_fx.training.telemetry import CSVWriter, Telemetry, TensorBoardWriter, read_history

moved.install()

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
    "DecoupledLambda",
    "Delayed",
    "Diff",
    "DynamicMethod",
    "Estimator",
    "Explanation",
    "Exponential",
    "ExportError",
    "FakeQuant",
    "Finding",
    "FoldError",
    "Format",
    "ForwardMethod",
    "GroupCurves",
    "Guard",
    "InputError",
    "IntegerCoverage",
    "LawError",
    "Levels",
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
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "PolicyError",
    "QParams",
    "QuantPolicy",
    "QuantSpec",
    "RampReplacement",
    "Rule",
    "ScaleLayout",
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
    "WeightFreezing",
    "add_format",
    "add_layout",
    "calibrate",
    "checkpoint_info",
    "convert",
    "convert_passes",
    "curves",
    "dampening_loss",
    "dataflow",
    "diff",
    "discretization_loss",
    "draw",
    "engines",
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
    "plan_of",
    "prepare",
    "prepare_passes",
    "read_history",
    "reestimate_batch_norm",
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
    "verify",
    "verify_export",
]
