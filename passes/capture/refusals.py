"""What can not be prepared is refused before anything is captured."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pege_fx.errors import ModelError
from pege_fx.modules.calls import global_hooks
from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.modules.stages import check_stage, unwrapped


def check_model(model: Any) -> None:
    """Refuse what can not be prepared: no module, prepared before, wrapped for training, not made yet, not finite."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is not an nn.Module: give the model itself.")
    if unwrapped(model) is not model:
        name = next(name for name, _ in model.named_children())
        raise ModelError(f"the model is wrapped in {type(model).__name__}: prepare model.{name} first, and wrap the result.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is scripted, and its code can not be taken apart: prepare the nn.Module that it was made of."
        )
    if kinds := global_hooks():
        raise ModelError(
            f"there are hooks for all modules ({', '.join(kinds)}), which a graph would not call.\n"
            "  remove them before prepare, or register them on the modules that they are for."
        )
    for name, module in model.named_modules():
        if isinstance(module, FakeQuant):
            raise ModelError(f"the model is prepared already ({name} is a fake-quant): prepare the float model.")
    check_stage(model, "float")
    parameters = [*model.named_parameters()]
    for name, tensor in [*parameters, *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(f"{name} has no shape yet (a lazy module): run the model once on example inputs, then prepare.")
    for name, parameter in parameters:
        if parameter.is_meta or not parameter.is_floating_point() or math.isfinite(parameter.detach().sum()):
            continue  # a finite sum has finite terms, and is one pass without a copy
        if count := int((~torch.isfinite(parameter)).sum()):
            raise ModelError(
                f"{name} has {count} of {parameter.numel()} values that are not finite.\n"
                "  load a good checkpoint, or set them before prepare."
            )
