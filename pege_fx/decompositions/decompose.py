"""Composite modules in operations that a tracer sees: which are written out, and where."""

import copy
from typing import Any

import torch
from torch import nn

from pege_fx.decompositions import recurrent, transformer
from pege_fx.decompositions.attention import ExplicitAttention, can_be_explicit
from pege_fx.decompositions.frozen_norm import freeze_norm
from pege_fx.modules.batch_norm import NORM_THEN, BatchNorm

_EXPLICIT = recurrent.EXPLICIT_LAYERS | recurrent.EXPLICIT_CELLS | transformer.EXPLICIT_LAYERS
_DIMENSIONS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}


def decompose_modules(root: nn.Module) -> None:
    """Let torch's attention, transformer and recurrent layers below ``root`` be written out, in place.

    Their subclasses stay as they are: their code is their own. A subclass of BatchNorm that is found to compute
    BatchNorm and then its children, as libraries have them for an activation, becomes just that; so does what normalises by
    fixed buffers alone.
    """
    found: dict[Any, bool] = {}
    for module in root.modules():
        if type(module) is nn.MultiheadAttention and can_be_explicit(module):
            module.__class__ = ExplicitAttention
        elif type(module) in _EXPLICIT:
            module.__class__ = _EXPLICIT[type(module)]
        elif isinstance(module, tuple(NORM_THEN)) and type(module).forward is not BatchNorm.forward:
            kind = (type(module), *map(type, module.children()))
            if kind not in found:
                found[kind] = _is_norm_then_children(module)
            if found[kind]:
                module.__class__ = NORM_THEN[_base(module)]
        elif "running_mean" in module._buffers and not isinstance(module, BatchNorm):
            freeze_norm(module)


def _base(module: nn.Module) -> type[nn.Module]:
    return next(cls for cls in NORM_THEN if isinstance(module, cls))


def _is_norm_then_children(module: nn.Module) -> bool:
    """Try it in both modes, outputs and statistics."""
    base = _base(module)
    reference = copy.deepcopy(module)
    explicit = copy.deepcopy(module)
    explicit.__class__ = NORM_THEN[base]
    tensor = next(module.parameters(), None)
    device = None if tensor is None else tensor.device
    x = torch.randn(4, int(module.num_features), *[3] * _DIMENSIONS[base], device=device)  # type: ignore[arg-type]
    try:
        for training in (True, False):
            outputs = []
            for candidate in (reference, explicit):
                with torch.random.fork_rng(), torch.no_grad():
                    torch.manual_seed(0)
                    outputs.append(candidate.train(training)(x.clone()))
            torch.testing.assert_close(*outputs)
        torch.testing.assert_close(explicit.state_dict(), reference.state_dict())
    except Exception:
        return False  # it computes something else, or can not be tried
    return True
