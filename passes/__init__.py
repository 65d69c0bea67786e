"""Graph passes: capture, writes, normal form, BatchNorm folding, sign analysis, plan, insertion, verification, lowering."""

from pege_fx.passes.capture import CaptureModel, capture, check_capture, drop_training_branches
from pege_fx.passes.effects import name_writes
from pege_fx.passes.fold_bn import FoldBatchNorm, FoldLeadingNorms
from pege_fx.passes.inline import inline_modules
from pege_fx.passes.insert import InsertFakeQuants
from pege_fx.passes.lower import (
    call_originals,
    drop_unused,
    follow_norms,
    lower_activations,
    lower_biases,
    lower_folds,
    lower_weights,
    pack_weights,
    unpack_weights,
)
from pege_fx.passes.normalize import normalize
from pege_fx.passes.operators import Operator, register
from pege_fx.passes.pipeline import Pass, Pipeline, apply, run
from pege_fx.passes.plan import MakePlan, complete_plan
from pege_fx.passes.program import Program, of_program
from pege_fx.passes.ranks import infer_ranks
from pege_fx.passes.sign import analyse_signs
from pege_fx.passes.verify import verify

__all__ = [
    "CaptureModel",
    "FoldBatchNorm",
    "FoldLeadingNorms",
    "InsertFakeQuants",
    "MakePlan",
    "Operator",
    "Pass",
    "Pipeline",
    "Program",
    "analyse_signs",
    "apply",
    "call_originals",
    "capture",
    "check_capture",
    "complete_plan",
    "drop_training_branches",
    "drop_unused",
    "follow_norms",
    "infer_ranks",
    "inline_modules",
    "lower_activations",
    "lower_biases",
    "lower_folds",
    "lower_weights",
    "name_writes",
    "normalize",
    "of_program",
    "pack_weights",
    "register",
    "run",
    "unpack_weights",
    "verify",
]
