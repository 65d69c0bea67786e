"""The functions and methods that a stored graph may name: those that compute on tensors, and nothing else.

A file names what its graph calls. Only names of this list are looked up, so that no file can reach a function that loads,
writes or runs anything.
"""

import math
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from pege_fx.decompositions import attention
from pege_fx.decompositions.recurrent import recurrent
from pege_fx.modules.autocast import SWITCHES
from pege_fx.modules.mode import CHECKS, contains, length, written
from pege_fx.numerics.functional import dequantize, dynamic_qparams, quantize
from pege_fx.numerics.packing import unpack
from pege_fx.passes.graph import is_foreign
from pege_fx.passes.operators import FUNCTIONS
from pege_fx.serialization.records import named_tuple, record

_NEW_TENSORS = ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
_LIMITS = (torch.finfo, torch.iinfo)  # of a number type: classes, whose values a graph reads
_PLAIN_FUNCTIONAL = (
    "hardsigmoid",
    "hardswish",
    "relu_",
    "elu_",
    "leaky_relu_",
    "hardtanh_",
    "sigmoid",
    "tanh",
    "upsample",
    "grouped_mm",
)
_NEW_METHODS = {
    "new_empty",
    "new_full",
    "new_ones",
    "new_tensor",
    "new_zeros",
    "unflatten",
}  # not overridable, say torch's lists
_NOT_ARITHMETIC = {"attrgetter", "call", "itemgetter", "methodcaller"}
_TORCHVISION = {  # functions that torchvision keeps whole in a trace
    "torchvision.ops.stochastic_depth": ("stochastic_depth",),
    "torchvision.models.swin_transformer": ("_get_relative_position_bias", "_patch_merging_pad", "shifted_window_attention"),
}
_OWN: dict[str, tuple[Callable[..., Any], ...]] = {  # names in files outlive the modules that they once were
    "pege_fx.functional": (quantize, dequantize, dynamic_qparams),
    "pege_fx.packing": (unpack,),
    "pege_fx.mode": (written, *CHECKS, length, contains),
    "pege_fx.autocast": SWITCHES,
    "pege_fx.attention": (attention.attention_mask, attention.padding_mask, attention.check_batched),
    "pege_fx.recurrent": (recurrent,),
    "pege_fx.results": (record, named_tuple),
    "collections": (OrderedDict,),
}
_LEAVING_TORCH = {"numpy", "tolist", "share_memory_", "backward", "register_hook", "storage", "untyped_storage", "data_ptr"}
READABLE = {"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag", "is_cuda", "layout", "data"}
READABLE |= {"values", "indices"}  # of what max, sort and topk return
_READABLE_LIMITS = {"bits", "eps", "max", "min", "resolution", "smallest_normal", "tiny"}


def is_readable(source: Any, name: Any) -> bool:
    """Whether a stored graph may read this attribute of what a node gives: a tensor, named results, limits of a type."""
    limits = isinstance(source, Node) and source.target in _LIMITS
    return name in (_READABLE_LIMITS if limits else READABLE)


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """Return every function of the vocabulary by its name."""
    overridable = {id(function) for found in torch.overrides.get_overridable_functions().values() for function in found}
    named: dict[str, Callable[..., Any]] = {}
    for prefix, namespace, also in (
        ("torch", torch, (*_NEW_TENSORS, "_assert", *(limits.__name__ for limits in _LIMITS))),
        ("torch.nn.functional", F, _PLAIN_FUNCTIONAL),
        ("torch.linalg", torch.linalg, ()),
        ("torch.special", torch.special, ()),
        ("torch.fft", torch.fft, ()),
    ):
        for name in dir(namespace):
            value = getattr(namespace, name)
            if callable(value) and (name in also or (id(value) in overridable and not name.startswith("_"))):
                named[f"{prefix}.{name}"] = value
    for module in (operator, math):
        for name in set(dir(module)) - _NOT_ARITHMETIC:
            if callable(getattr(module, name)) and not name.startswith("_"):
                named[f"{module.__name__}.{name}"] = getattr(module, name)
    for prefix, own in _OWN.items():
        named |= {f"{prefix}.{function.__name__}": function for function in own}
    named["builtins.getattr"] = getattr
    for path, names in _TORCHVISION.items():
        named |= {f"{path}.{name}": function for name in names if (function := _loaded(path, name)) is not None}
    return named


def _loaded(module: str, name: str) -> Callable[..., Any] | None:
    """A function of an optional package, if the package is there."""
    try:
        __import__(module)
    except ImportError:
        return None
    found: Callable[..., Any] | None = getattr(sys.modules[module], name, None)
    return found


@cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(functions().items())}


def name_of(function: Any) -> str | None:
    """Return the name of a function of the vocabulary, or None.

    >>> name_of(torch.nn.functional.relu), name_of(print)
    ('torch.nn.functional.relu', None)
    """
    return _names().get(id(function)) or next((name for name, known in registered().items() if known is function), None)


def function_of(name: str) -> Callable[..., Any]:
    """Return the function of a name in a file; KeyError for any that is not on the list."""
    known = functions().get(name)
    return registered()[name] if known is None else known


def registered() -> dict[str, Callable[..., Any]]:
    """Return the functions of operations that this process registered: they too may be named in a file."""
    own = [function for function in FUNCTIONS if type(function) is FunctionType]
    return {f"{function.__module__}.{function.__qualname__}": function for function in own if is_foreign(function)}


@cache
def methods() -> frozenset[str]:
    """Return the names of the tensor methods of the vocabulary."""
    arithmetic = {f"__{name.strip('_')}__" for name in operator.__all__}
    named = {function.__name__ for function in torch.overrides.get_overridable_functions()[Tensor]}
    return frozenset(name for name in named if not name.startswith("_") or name in arithmetic) - _LEAVING_TORCH | _NEW_METHODS
