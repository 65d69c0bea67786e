"""Where models run: engines by name, and the reference engine, which computes in integers what a converted graph says.

``register`` an engine of your own, and policies, ``pege_fx.export``, ``pege_fx.verify``, ``pege_fx.explain`` and the command
line know it by its name.
"""

import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from pege_fx.engines.engine import Engine, Profile, Refusal, Verdict, engine_of, names, register
from pege_fx.engines.onnxruntime import OnnxRuntime
from pege_fx.errors import ExportError
from pege_fx.modules.stages import graph_of

__all__ = ["Engine", "OnnxRuntime", "Profile", "Refusal", "Verdict", "engine_of", "export", "names", "register", "verify"]

register(OnnxRuntime())


def export(
    deployed: GraphModule,
    path: str | os.PathLike[str],
    example_inputs: tuple[Any, ...] | Tensor = (),
    *,
    engine: Engine | str = "onnxruntime",
    **options: Any,
) -> int:
    """Write a converted model as an engine reads it; return the size in bytes.

    Args:
        deployed: the result of ``pege_fx.convert``.
        path: of the file.
        example_inputs: positional arguments of ``forward``.
        engine: its name, or the engine.
        options: of the engine; ``"onnxruntime"`` takes those of ``export_onnx``.

    Raises:
        ExportError: an engine that is not known or not installed, a model that was not converted, or what the engine refuses.

    >>> import tempfile
    >>> import torch
    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU6(), torch.nn.Conv2d(4, 2, 3))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> gm = pege_fx.prepare(model, pege_fx.QuantPolicy.parse("W8A8", engine="onnxruntime"), x)
    >>> deployed = pege_fx.convert(gm, integer_bias=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = export(deployed, f"{folder}/model.onnx", x)
    ...     verify(deployed, f"{folder}/model.onnx", [x]).ok
    True
    """
    return engine_of(engine).export(graph_of(deployed, "converted", error=ExportError), path, example_inputs, **options)


def verify(
    deployed: GraphModule, path: str | os.PathLike[str], batches: Iterable[Any], *, engine: Engine | str = "onnxruntime"
) -> Verdict:
    """Run a file in an engine and hold it against the converted model; the result prints as a verdict.

    Args:
        deployed: the model that was exported.
        path: the file that ``export`` wrote.
        batches: what ``calibrate`` takes.
        engine: its name, or the engine.

    Raises:
        ExportError: an engine that is not known or not installed, or a file that is not of this model.
        InputError: no batch, or one that does not fit.

    >>> import tempfile
    >>> import torch
    >>> import pege_fx
    >>> x = torch.randn(2, 4)
    >>> deployed = pege_fx.convert(pege_fx.prepare(torch.nn.Linear(4, 2), "W8A8", x), integer_bias=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = export(deployed, f"{folder}/model.onnx", x)
    ...     verify(deployed, f"{folder}/model.onnx", [x]).verdict in ("exact", "ties")
    True
    """
    return engine_of(engine).verify(graph_of(deployed, "converted", error=ExportError), path, batches)


class _Callable(ModuleType):
    """``pege_fx.export`` is the folder of writers, and it is called as ``export``: a function of that name would hide it."""

    __call__ = staticmethod(export)


sys.modules["pege_fx.export"].__class__ = _Callable
