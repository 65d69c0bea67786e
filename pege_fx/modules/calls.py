"""What the call of a module does besides its class's ``forward``: hooks, a ``forward`` or a ``__call__`` of its own."""

from torch import nn

FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Tell whether anything is called before or after a module's forward or backward."""
    return any(vars(module).get(name) for name in HOOKS)


def beside_forward(module: nn.Module) -> str:
    """Return what a module's call does besides its class's ``forward``, in words; "" if nothing."""
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    kinds = [name.strip("_").removesuffix("_hooks").replace("_", " ") for name in HOOKS if vars(module).get(name)]
    return f"it has {' and '.join(kinds)} hooks" if kinds else ""
