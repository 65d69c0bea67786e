"""Copying a model before it is prepared: what came in stays as it is."""

import copy
import copyreg
import io
import itertools
import operator
import types
from collections import OrderedDict
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pege_fx.errors import ModelError
from pege_fx.modules.calls import HOOKS, takes_hooks

_HUGE_PAGES = 2**22  # from so many bytes on NumPy asks for them
_PLAIN = {type(None), bool, int, float, str}
_COLLECTIONS = {dict, OrderedDict, set, tuple}


def copied(model: nn.Module, share_parameters: bool, share_buffers: bool | None = None) -> nn.Module:
    """Do as ``copy.deepcopy``, which takes longer than tracing, with short cuts for what modules are mostly made of.

    Large parameters: memory from NumPy, which asks for huge pages; touching it costs a quarter. Modules that say nothing of
    how they are copied, and in them tensors, numbers, and collections by names or of them (a module has a dozen).

    Args:
        model: left alone.
        share_parameters: hold the model's own parameters.
        share_buffers: hold its own buffers; None: as ``share_parameters``.
    """
    share_buffers = share_parameters if share_buffers is None else share_buffers
    modules = list(model.modules())
    copies: dict[int, Any] = {}
    for module in modules:
        for values, shared in ((module._parameters, share_parameters), (module._buffers, share_buffers)):
            for value in values.values():
                if value is not None and id(value) not in copies:
                    _copy_tensor(value, copies, shared)
    try:
        for module in itertools.filterfalse(takes_hooks, modules):
            copies.setdefault(id(module), module if share_parameters else _copy_scripted(module))
        for module in reversed(modules):  # children first
            if id(module) not in copies and _is_copied_by_its_attributes(type(module)):
                copies[id(module)] = made = type(module).__new__(type(module))
                vars(made).update({name: _copy_value(value, copies) for name, value in vars(module).items()})
        made = copy.deepcopy(model, copies)
        for module in filter(takes_hooks, made.modules()):
            _rebind(module, copies)
        for parameter in model.parameters():
            _keep_hooks(parameter, copies.get(id(parameter), parameter), copies)
        return made
    except Exception as error:
        hint = "torch.nn.utils.parametrizations.weight_norm can be." if "weight_norm" in str(error) else ""
        raise ModelError(f"the model can not be copied: {type(error).__name__}: {error}\n  {hint}".rstrip()) from error


def _is_copied_by_its_attributes(cls: type[nn.Module]) -> bool:
    """Tell whether ``deepcopy`` would copy a module attribute by attribute."""
    if cls.__module__.startswith("torch.nn.modules."):
        return True
    hooks = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__new__")
    as_usual = all(getattr(cls, hook, None) is getattr(nn.Module, hook, None) for hook in hooks)
    others = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
    return as_usual and not any(hasattr(cls, hook) for hook in others) and cls not in copyreg.dispatch_table


def _copy_tensor(value: Tensor, copies: dict[int, Any], shared: bool) -> None:
    """Copy a parameter or buffer, or not if it is ``shared``; what there is more to say of is left to ``deepcopy``."""
    if shared:
        copies[id(value)] = value
    elif type(value) is nn.Parameter and not vars(value):
        copies[id(value)] = nn.Parameter(_copy_numbers(value.detach()), value.requires_grad)
    elif type(value) is Tensor and not vars(value) and not value.requires_grad:
        copies[id(value)] = _copy_numbers(value)


def _copy_numbers(value: Tensor) -> Tensor:
    if value.layout is not torch.strided:  # sparse
        return value.clone()
    if value.is_cpu and value.dtype is torch.float32 and value.nbytes >= _HUGE_PAGES and value.is_contiguous():
        return torch.from_numpy(numpy.empty(value.shape, numpy.float32)).copy_(value)
    return value.clone(memory_format=torch.preserve_format)


def _copy_value(value: Any, copies: dict[int, Any]) -> Any:
    cls = type(value)
    if cls in _PLAIN:
        return value
    if (made := copies.get(id(value))) is not None:
        return made
    if cls not in _COLLECTIONS or not all(map(_PLAIN.__contains__, map(type, value))):
        return copy.deepcopy(value, copies)
    if cls is tuple:
        return value
    copies[id(value)] = made = cls()
    if value:  # most are empty
        made.update(value if cls is set else {key: _copy_value(part, copies) for key, part in value.items()})
    return made


def _copy_scripted(module: nn.Module) -> nn.Module:
    """Copy by way of its file: after torch's own ``deepcopy`` the copy's parameters are no leaves and do not train."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    made: nn.Module = torch.jit.load(file)  # type: ignore[no-untyped-call]
    return made


def _rebind(module: nn.Module, copies: dict[int, Any]) -> None:
    """Let hooks and a patched ``forward`` hold the copy where they held the model: ``deepcopy`` copies no function."""
    attributes = vars(module)
    if "forward" in attributes:
        attributes["forward"] = _rebound(attributes["forward"], copies)
    for name in HOOKS:
        for key, hook in (attributes.get(name) or {}).items():
            attributes[name][key] = _rebound(hook, copies)


def _keep_hooks(parameter: Tensor, twin: Tensor, copies: dict[int, Any]) -> None:
    """Register on the copy of a parameter what is called with its gradient: torch copies no hooks of tensors."""
    if twin is parameter:
        return
    for hook in (getattr(parameter, "_backward_hooks", None) or {}).values():
        twin.register_hook(_rebound(hook, copies))  # type: ignore[no-untyped-call]
    for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
        twin.register_post_accumulate_grad_hook(_rebound(hook, copies))  # type: ignore[no-untyped-call]


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """Return a function, or what one holds, with the model's modules and tensors replaced by their copies."""
    if isinstance(value, (nn.Module, Tensor)):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _rebound(value.__self__, copies))
    if type(value) in (tuple, list):
        held = [_rebound(part, copies) for part in value]
        return value if all(map(operator.is_, held, value)) else type(value)(held)
    if not isinstance(value, types.FunctionType):
        return value
    cells = tuple(_rebound_cell(cell, copies) for cell in value.__closure__ or ())
    defaults = _rebound(value.__defaults__, copies)
    if all(map(operator.is_, cells, value.__closure__ or ())) and defaults is value.__defaults__:
        return value
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
    made.__dict__.update(vars(value))
    made.__kwdefaults__ = value.__kwdefaults__ and {k: _rebound(part, copies) for k, part in value.__kwdefaults__.items()}
    return made


def _rebound_cell(cell: types.CellType, copies: dict[int, Any]) -> types.CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # a name that has no value yet
        return cell
    found = held if held is cell else _rebound(held, copies)
    return cell if found is held else types.CellType(found)
