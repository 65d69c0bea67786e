"""What the call of a module does besides its class's ``forward``: hooks, a ``forward`` or a ``__call__`` of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as of_all_modules

FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Tell whether anything is called before or after a module's forward or backward."""
    return any(vars(module).get(name) for name in HOOKS)


def takes_hooks(module: nn.Module) -> bool:
    """Tell whether hooks may be registered on a module; a scripted one takes none."""
    return not isinstance(module, torch.jit.ScriptModule)


def beside_forward(module: nn.Module) -> str:
    """Return what a module's call does besides its class's ``forward``, in words; "" if nothing."""
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    kinds = [name.strip("_").removesuffix("_hooks").replace("_", " ") for name in HOOKS if vars(module).get(name)]
    return f"it has {' and '.join(kinds)} hooks" if kinds else ""


def takes_other_arguments(module: nn.Module) -> bool:
    """Tell whether a module's call may take other arguments than its ``forward`` does."""
    return type(module).__call__ is not nn.Module.__call__ or bool(vars(module).get("_forward_pre_hooks"))


_REGISTERING: tuple[Callable[[Callable[..., Any]], Any], ...] = (
    of_all_modules.register_module_forward_pre_hook,
    of_all_modules.register_module_forward_hook,
    of_all_modules.register_module_full_backward_pre_hook,
)


def global_hooks() -> list[str]:
    """Return which functions have registered hooks that torch calls for every module."""
    found = []
    for register in _REGISTERING:
        handle = register(lambda *_: None)  # torch shows the hooks to nobody but a handle
        if len(handle.hooks_dict_ref()) > 1:
            found.append(register.__name__)
        handle.remove()
    with torch.enable_grad():
        probe = torch.zeros((), requires_grad=True)
        if not found and nn.Identity()(probe) is not probe:  # to register one for backward would forbid the other kind
            found.append("register_module_full_backward_hook")
    return found
