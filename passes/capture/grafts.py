"""Graphs inside modules that stay Python: what the Python code around them may ask of the module that a graph stands for."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from pege_fx.modules.fixed_attributes import CapturedGraph
from pege_fx.passes.capture.bytecode import Names


class Grafted(CapturedGraph):
    """A graph inside a module that stays Python, with the plain attributes and the class that its parent's code may ask for.

    To ``isinstance`` it is both a GraphModule and what it stands for.
    """

    _stands_for: type[nn.Module] | None = None  # a block that was asked for is a graph and nothing else
    _read: frozenset[str] = frozenset()
    _carried = (*CapturedGraph._carried, "_stands_for", "_read")

    @property
    def __class__(self) -> type:
        """The class of the module that it stands for, as ``isinstance`` asks for it where ``type`` does not tell."""
        return vars(self).get("_stands_for") or type(self)

    @__class__.setter
    def __class__(self, cls: type) -> None:
        """Take another class, as ``fully_shard`` gives it; one made on top of what the graph stands for is made on its own."""
        stands_for = vars(self).get("_stands_for")
        if stands_for is not None and stands_for in cls.__bases__:
            own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
            cls = type(cls.__name__, tuple(type(self) if base is stands_for else base for base in cls.__bases__), own)
        vars(object)["__class__"].__set__(self, cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        copied = super().__deepcopy__(memo)
        stand_for(self, copied, self._read)
        return copied


def read_from_outside(module: nn.Module) -> frozenset[str]:
    """Return the names of a graph's tensors that Python code around it was seen to read."""
    return module._read if isinstance(module, Grafted) else frozenset()


def stand_for(source: nn.Module, target: GraphModule, read: Iterable[str] = ()) -> None:
    """Let a graph have the class of a module, its attributes, and its numbers and texts that only the class has.

    ``read`` are the names of tensors that the code around it was seen to read.
    """
    cls = source._stands_for if isinstance(source, Grafted) else source.__class__
    vars(target).update(_stands_for=cls, _read=frozenset(read))
    for name in [name for name, value in [*source._parameters.items(), *source._buffers.items()] if value is None]:
        setattr(target, name, None)  # a layer without a bias
    constants = {name: value for cls in reversed(source.__class__.__mro__) for name, value in vars(cls).items()}
    constants = {name: value for name, value in constants.items() if isinstance(value, _CONSTANTS)}
    for name, value in (constants | vars(source)).items():
        if not name.startswith("_") and not hasattr(target, name) and not isinstance(value, (Tensor, nn.Module)):
            setattr(target, name, value)


def may_be_opened(names: Names, name: str, child: nn.Module) -> bool:
    """Tell whether code around a child may use more of it than its call, its tensors and its plain attributes.

    A graph has no other methods and none of the module's children, or no longer under their names. Such a child stays what it
    is, and each of its own children becomes a graph.

    Args:
        names: of the code around it.
        name: under which that code has it.
        child: the module.
    """
    if name in names.values and _is_collection(child):
        return True
    if _delegates(child) and any(on in (name, None) and read not in _OF_MODULES for on, read in names.methods):
        return True
    own = {attribute for cls in _own_classes(child) for attribute, value in vars(cls).items() if hasattr(value, "__get__")}
    if any(names.may_call(name, method) for method in own - _OF_MODULES - set(child._modules)):
        return True
    return any((name, part) in names.methods or _may_be_a_part(names, part) for part in child._modules)


def _may_be_a_part(names: Names, part: str) -> bool:
    """Tell whether code reads a name of nobody knows what, and tensors have nothing of that name: ``x.norm()`` is no part."""
    return (None, part) in names.methods and not hasattr(Tensor, part)


def _own_classes(module: nn.Module) -> list[type]:
    return [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.") and cls is not object]


def _is_collection(module: nn.Module) -> bool:
    """Tell whether code may walk through a module instead of calling it, or count what is in it."""
    return isinstance(module, nn.Sequential) or any(
        name in vars(cls) for cls in _own_classes(module) for name in ("__len__", "__iter__", "__getitem__", "__contains__")
    )


def _delegates(module: nn.Module) -> bool:
    """Tell whether a module answers for attributes that it does not have, as wrappers do."""
    return any("__getattr__" in vars(cls) or "__getattribute__" in vars(cls) for cls in _own_classes(module))


_CONSTANTS = (bool, int, float, str)
_OF_MODULES = set(dir(nn.Module))
