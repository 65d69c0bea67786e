"""What a model's own modules do to a state dict before it is loaded, kept for the graph that was captured of them.

A graph has plain modules where the model had classes of its own. Their ``_load_from_state_dict``, load hooks and
``set_extra_state`` run on what is to be loaded, each on a shell of its module: the class and its attributes, with tensors that
hold nothing.
"""

import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from pege_fx.errors import ModelError
from pege_fx.passes.capture.bytecode import names_in_forward

_PRE_HOOKS, _POST_HOOKS = "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"
_EXTRA = "_extra_state"
_PLAIN = (type(None), bool, int, float, str)


def keep_load_hooks(root: nn.Module, gm: GraphModule) -> None:
    """Let a graph load as the module does that it was captured of.

    >>> gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    >>> keep_load_hooks(nn.Sequential(nn.Linear(2, 2)), gm)  # nothing of its own
    """
    present = dict(gm.named_modules(remove_duplicate=False))
    for path, module in root.named_modules():
        if present.get(path) is module or isinstance(module, (GraphModule, torch.jit.ScriptModule)):
            continue  # it loads by itself
        if _rewrites(module):
            gm.register_load_state_dict_pre_hook(_Rewrite(path, _shell(module)))  # type: ignore[no-untyped-call]
        for hook in vars(module).get(_POST_HOOKS, {}).values():
            gm.register_load_state_dict_post_hook(_After(hook, _shell(module)))  # type: ignore[no-untyped-call]


def _has(module: nn.Module, method: str) -> bool:
    """Whether a module's class has a method of its own, where ``nn.Module`` has another."""
    found = getattr(type(module), method)
    return found is not getattr(nn.Module, method) and not str(found.__module__).startswith(("torch.", "pege_fx."))


def _rewrites(module: nn.Module) -> bool:
    hooks = any(not _is_of_a_library(hook) for hook in vars(module).get(_PRE_HOOKS, {}).values())
    return hooks or _has(module, "_load_from_state_dict") or _has(module, "set_extra_state")


def _is_of_a_library(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith(("torch.", "pege_fx."))


def _shell(module: nn.Module) -> nn.Module:
    """A module without memory: its class, attributes and children, with tensors that hold nothing."""
    is_graph = isinstance(module, GraphModule)  # below a module that stays Python: it loads by itself
    made = nn.Module() if is_graph else type(module).__new__(type(module))
    vars(made).update({} if is_graph else vars(module))
    for kind in ("_parameters", "_buffers"):
        vars(made)[kind] = {name: None if tensor is None else _hollow(tensor) for name, tensor in vars(module)[kind].items()}
    vars(made)["_modules"] = {name: child and _shell(child) for name, child in module._modules.items()}
    hooks = vars(module).get(_PRE_HOOKS, {})
    vars(made)[_PRE_HOOKS] = type(hooks)((key, _held_by(hook, made)) for key, hook in hooks.items())
    return made


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    hollow = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow


def _held_by(hook: Any, shell: nn.Module) -> Any:
    """A hook that is given its module gets the shell; torch's wrapper holds the module by a weak reference."""
    return functools.partial(hook.hook, shell) if getattr(hook, "with_module", False) else hook


class _Rewrite:
    """Runs what a module does to the entries of a state dict that are its own or its children's."""

    def __init__(self, path: str, shell: nn.Module) -> None:
        self.path, self.shell = path, shell

    def __call__(
        self, _: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        prefix = f"{prefix}{self.path}." if self.path else prefix
        own = {key: value for key, value in state.items() if key.startswith(prefix)}
        before = set(own)
        extra = own.pop(f"{prefix}{_EXTRA}", None) if _has(self.shell, "set_extra_state") else None
        found: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied into a tensor that holds nothing
            self.shell._load_from_state_dict(own, prefix, metadata, False, [], [], found)
        errors += [error for error in found if not error.startswith("size mismatch")]  # which is said again
        for key in before - own.keys():
            del state[key]
        state |= own
        if extra is not None:
            self._set(extra)

    def _set(self, extra: Any) -> None:
        """Hand extra state to the module; refuse what would change the function of a graph that is fixed."""
        attributes = vars(self.shell).copy()
        self.shell.set_extra_state(extra)
        read = names_in_forward(self.shell).read
        changed = [
            name
            for name, value in vars(self.shell).items()
            if name in read
            and (type(value) not in _PLAIN or value != attributes.get(name))
            and value is not attributes.get(name)
        ]
        if changed:
            vars(self.shell).update(attributes)
            raise ModelError(
                f"the extra state of {self.path or 'the model'} changes .{changed[0]}, which forward reads and the graph holds "
                "as it was.\n  load the state into the float model, and prepare that."
            )


class _After:
    """Runs a hook for after loading on the shell of its module."""

    def __init__(self, hook: Any, shell: nn.Module) -> None:
        self.hook, self.shell = hook, shell

    def __call__(self, _: nn.Module, incompatible: Any) -> Any:
        return self.hook(self.shell, incompatible)
