"""Modules under the names that they had until 0.1: imports and whole-model pickles of that time go on working.

A finder answers for the old name with the module itself, and a warning says the new one.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# Not diff, draw, report and sensitivity: importing a module of that name would hide the public function.
MOVED = {
    "accumulators": "engines.accumulators",
    "attention": "decompositions.attention",
    "batch_norm": "modules.batch_norm",
    "c_kernels": "kernels.c_kernels",
    "checkpoint": "serialization.checkpoint",
    "container": "serialization.tensor_tree",
    "coverage": "inspection.coverage",
    "curves": "training.curves",
    "dataflow": "inspection.dataflow",
    "diff_picture": "inspection.diff_picture",
    "distributed": "training.sharding",
    "ewgs": "training.ewgs",
    "explicit": "decompositions.decompose",
    "fake_quant": "modules.fake_quant",
    "files": "_utils.files",
    "functional": "numerics.functional",
    "guard": "training.guard",
    "integer": "engines.integer",
    "layouts": "kernels.tensor_layout",
    "listing": "_utils.listing",
    "mixed_precision": "policy.mixed_precision",
    "mode": "modules.mode",
    "outline": "inspection.display_graph",
    "packing": "numerics.packing",
    "plan": "policy.plan",
    "processes": "_utils.collectives",
    "quantizers": "modules.methods",
    "recompute": "numerics.recompute",
    "recurrent": "decompositions.recurrent",
    "scheduler": "training.scheduler",
    "size": "inspection.size",
    "spec": "numerics.spec",
    "storage": "serialization.deployed",
    "tables": "inspection.tables",
    "telemetry": "training.telemetry",
    "transformer": "decompositions.transformer",
    "triton_kernels": "kernels.triton_kernels",
    "vocabulary": "serialization.allowlist",
    "passes.branches": "passes.capture.branches",
    "passes.copies": "passes.capture.model_copy",
    "passes.draws": "passes.capture.rng_guard",
    "passes.places": "passes.capture.source_location",
    "passes.proxies": "passes.capture.proxies",
    "passes.state": "passes.capture.module_state",
    "passes.threads": "passes.capture.patching",
    "passes.trace": "passes.capture.tracer",
}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module of 0.1 by its old name and loads it as the module that it is now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return importlib.util.spec_from_loader(fullname, self) if package == "pege_fx" and name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"pege_fx.{MOVED[old.removeprefix('pege_fx.')]}"
        warnings.warn(f"{old} is {new} now.", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)  # Python's import returns what stands here, not the empty module


def install() -> None:
    """Let Python find the old names, after everything else."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
