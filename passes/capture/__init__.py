"""Capture: a model as graphs. The tracer, what it takes for granted, and the tiers that it falls back to."""

from pege_fx.passes.capture.branches import drop_training_branches
from pege_fx.passes.capture.steps import CaptureModel, check_capture
from pege_fx.passes.capture.tiers import capture

__all__ = ["CaptureModel", "capture", "check_capture", "drop_training_branches"]
