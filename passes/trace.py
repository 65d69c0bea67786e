"""Capture: from any ``nn.Module`` to a GraphModule with ``.training`` live and no dead nodes."""

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Proxy, Tracer
from torch.fx.proxy import TraceError as FxTraceError

from pege_fx.errors import InputError, ModelError, PegeWarning, TraceError
from pege_fx.fake_quant import FakeQuant
from pege_fx.passes.graph import has_attribute, remove_dead_nodes, where_raised

TRAINING_MODE = "training_mode"


class TrainingMode(nn.Module):
    """Returns its own ``training``: what ``self.training`` becomes in a traced graph, so that ``train()`` reaches it."""

    def forward(self) -> bool:
        return self.training


class PegeTracer(Tracer):
    """fx's tracer; with ``live_training``, ``self.training`` is a value of the graph.

    Unpickling a GraphModule makes one without: it traces the generated code, where that value is a module's call.
    """

    def __init__(self, live_training: bool = False) -> None:
        super().__init__()
        self.live_training = live_training
        self.specialised: list[str] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._mode_node: Any = None

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        prepared = super().create_args_for_root(root_fn, is_module, concrete_args)
        if not self.live_training:
            return prepared
        mode = self.create_proxy("call_module", TRAINING_MODE, (), {})
        self._mode_node = mode.node
        for name, module in self.root.named_modules():
            if not self.is_leaf_module(module, name):
                self._modes.append((module, module.training))
                module.__dict__["training"] = mode
        return prepared

    def to_bool(self, obj: Proxy) -> bool:
        """Python asks for a value: known for ``self.training`` alone, as the model stands now."""
        if obj.node is self._mode_node:
            training = self._modes[0][1]
            self.specialised.append("if self.training")
            return training
        return bool(super().to_bool(obj))

    def mode_is_read(self) -> bool:
        """Whether the graph needs the mode; if not, its node goes."""
        if self._mode_node.users:
            return True
        self._mode_node.graph.erase_node(self._mode_node)
        return False

    def restore_modes(self) -> None:
        for module, training in self._modes:
            module.__dict__["training"] = training


def check_model(model: Any) -> None:
    """Refuse what can not be prepared: no module, prepared before, weights that are not finite."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is not an nn.Module: give the model itself.")
    for name, module in model.named_modules():
        if isinstance(module, FakeQuant):
            raise ModelError(f"the model is prepared already ({name} is a fake-quant): prepare the float model.")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or bool(torch.isfinite(parameter.detach().sum())):
            continue  # a finite sum has finite terms, and is one pass without a copy
        if count := int((~torch.isfinite(parameter)).sum()):
            raise ModelError(
                f"{name} has {count} of {parameter.numel()} values that are not finite.\n"
                "  load a good checkpoint, or set them before prepare."
            )


def check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ``InputError`` if the example inputs do not fit the signature of ``forward``."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}.\n"
            f"  given: {len(args)} positional, keywords {sorted(kwargs) or 'none'}; "
            "example_inputs is a tuple of positional arguments, example_kwargs a dict."
        ) from error


def trace(model: nn.Module) -> GraphModule:
    """Trace a copy of the model symbolically; the result keeps every parameter and buffer under its own name.

    Raises:
        TraceError: for control flow on values; says where.
    """
    root = copy.deepcopy(model)
    tracer = PegeTracer(live_training=True)
    try:
        graph = tracer.trace(root)
    except (FxTraceError, TypeError, RuntimeError, AttributeError, ValueError, NotImplementedError) as error:
        raise TraceError(
            f"{type(model).__name__} can not be traced: {error}\n"
            f"  at {where_raised(error, type(model))}\n"
            "  take the control flow out of forward, or wrap the function around it with torch.fx.wrap."
        ) from error
    finally:
        tracer.restore_modes()
    if tracer.specialised:
        warnings.warn(
            f"{type(model).__name__}.forward branches on self.training: the graph keeps the branch of "
            f"training={root.training}. Prepare the model in the mode that it will run in.",
            PegeWarning,
            stacklevel=3,
        )
    if tracer.mode_is_read():
        root.add_module(TRAINING_MODE, TrainingMode())  # not before: a Sequential would call it
    gm = GraphModule(root, graph, class_name=type(model).__name__)
    remove_dead_nodes(gm)
    _keep_everything(root, gm)
    gm.recompile()
    return gm


def _keep_everything(root: nn.Module, gm: GraphModule) -> None:
    """Give the GraphModule what the graph does not use too, so that float checkpoints load key by key."""
    for path, module in root.named_modules(remove_duplicate=False):
        if path and not has_attribute(gm, path):
            gm.add_submodule(path, module)
        kept = gm.get_submodule(path)
        if kept is module:
            continue
        kept.training = module.training
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not hasattr(kept, name):
                kept.register_parameter(name, parameter)
        persistent = set(module.state_dict(keep_vars=True))
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if not hasattr(kept, name):
                kept.register_buffer(name, buffer, persistent=name in persistent)
