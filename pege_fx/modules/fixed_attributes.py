"""Plain attributes that a graph holds as constants: to assign one later would change nothing, so it is refused."""

import copyreg
import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.fx import GraphModule

from pege_fx.errors import ModelError

Fixed: TypeAlias = Mapping[str, Mapping[str, str]]  # by module path and name: the value as Python writes it, "" for an object
_RECORD, _NAMES, _PATH = "_fixed", "_fixed_here", "_fixed_at"  # on a graph; on each module, the names and its path
_LOAD_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_PLAIN = (type(None), bool, int, float, str, tuple)


class FixedAttributes(nn.Module):
    """A module some of whose attributes are constants of a graph: to assign another value is a ``ModelError``.

    Modules become one when their model is prepared, and stay instances of their own class.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        fixed = vars(self).get(_NAMES)
        if fixed is not None and name in fixed and not (fixed[name] and shown(value) == fixed[name]):
            path, was = vars(self)[_PATH], f" as {fixed[name]}" if fixed[name] else ""
            raise ModelError(
                f"{f'{path}.' if path else ''}{name} is fixed in the graph{was}: to assign it would change nothing.\n"
                "  set it on the model before prepare, and prepare that."
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any, /) -> Any:
        """Copy and pickle as the module's own class: whoever copies the graph fixes its attributes again."""
        reduced: Any = super().__reduce_ex__(protocol)
        if isinstance(self, GraphModule):
            return reduced
        function, args, state, *rest = reduced
        own = tuple(type(self).__bases__[1] if arg is type(self) else arg for arg in args)
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in (_NAMES, _PATH)}
        return _new if function is _NEW else function, own, state, *rest


_NEW: Any = vars(copyreg)["__newobj__"]


def _new(cls: type[nn.Module], *args: Any) -> nn.Module:
    """Do as ``copyreg.__newobj__``, which pickle takes for objects of their own class alone."""
    return cls.__new__(cls, *args)


class CapturedGraph(FixedAttributes, GraphModule):
    """A graph that was captured, with what fx forgets when it copies or pickles one.

    Which attributes are constants of it, and, of a pickle, the hooks that loading a state calls.
    """

    _carried: tuple[str, ...] = (_RECORD, "accepts_loss_kwargs")

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        copied: GraphModule = super().__deepcopy__(memo)
        return _carry(copied, self._kept())

    def __reduce__(self) -> Any:
        function, args = super().__reduce__()
        left = {name: value for name, value in args[0].items() if name not in (_NAMES, _PATH, *_LOAD_HOOKS)}
        before, after = (tuple(vars(self)[kind].values()) for kind in _LOAD_HOOKS)
        hooks = tuple(hook.hook for hook in before), after  # without torch's wrapper, which holds this graph
        return _unpickled, (type(self).__bases__[0], function, (left, *args[1:]), self._kept(), hooks)

    def _kept(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self._carried if name in vars(self)}


def _unpickled(cls: type[CapturedGraph], function: Any, args: Any, kept: dict[str, Any], hooks: Any = ((), ())) -> GraphModule:
    """Make a graph again as fx does, of the class that it had."""
    gm: GraphModule = function(*args)
    type(gm).__bases__ = (cls,)  # of the class that fx has made for this one graph
    for register, found in zip(
        (gm.register_load_state_dict_pre_hook, gm.register_load_state_dict_post_hook), hooks, strict=True
    ):
        for hook in found:
            register(hook)  # type: ignore[no-untyped-call]
    return _carry(gm, kept)


def _carry(gm: GraphModule, kept: Mapping[str, Any]) -> GraphModule:
    vars(gm).update(kept)
    fix(gm)
    return gm


def fix(root: nn.Module, attributes: Fixed | None = None) -> None:
    """Refuse from now on that attributes of the modules of a graph are assigned.

    Args:
        root: a graph.
        attributes: by the paths of modules; what is none of ``root`` is left out. Default: those of the last time, for
            modules that were made since then.
    """
    if attributes is not None:
        vars(root)[_RECORD] = attributes
    for path, names in vars(root).get(_RECORD, {}).items():
        module = _found(root, path)
        if module is None or isinstance(module, torch.jit.ScriptModule):
            continue
        if not isinstance(module, FixedAttributes):
            cls: Any = type(module)
            module.__class__ = _fixed_class(cls)
        vars(module).update({_NAMES: dict(names), _PATH: path})


def _found(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


@functools.cache
def _fixed_class(cls: Any) -> Any:
    """A subclass of a module's class that looks like it."""
    return type(cls)(cls.__name__, (FixedAttributes, cls), {key: getattr(cls, key) for key in _SHOWN_OF_CLASS})


_SHOWN_OF_CLASS = ("__module__", "__qualname__", "__doc__")


def shown(value: Any) -> str:
    """Return a plain value as Python writes it, "" of any other."""
    return repr(value) if isinstance(value, _PLAIN) else ""
