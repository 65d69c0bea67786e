"""Parameters that a call may write, copied right before: a copy of every one would cost as much memory as the model."""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_FROM_C = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.GetSetDescriptorType,
)
# Not called after what they do: memory is handed on, or a tensor is written that is not the first.
_HANDING_OUT = {"__set__", "__setitem__", "__array__", "__dlpack__", "numpy", "data_ptr", "untyped_storage", "storage"}
_HANDING_OUT |= {"batch_norm", "instance_norm", "apply_", "map_"}
_PLACE_OF_MAX_NORM = 3  # of an embedding's arguments
_EMBEDDINGS = {"embedding", "embedding_bag"}


class Copied(NamedTuple):
    """A tensor, another name of its memory, and what was in it."""

    tensor: Tensor
    memory: Tensor
    value: Tensor

    def put_back(self) -> None:
        """Give the tensor its memory, size and values."""
        if self.tensor.layout is not torch.strided:  # it has no one memory
            self.tensor.data = self.value
            return
        if self.tensor.data_ptr() != self.memory.data_ptr():  # ``tensor.data = other``
            self.tensor.data = self.memory
        if self.tensor.shape != self.value.shape:
            self.tensor.resize_(self.value.shape)
        if not torch.equal(self.tensor, self.value):
            self.tensor.copy_(self.value)


def copied(tensor: Tensor) -> Copied:
    """Note what a tensor holds."""
    memory = tensor.detach()
    return Copied(tensor, memory, memory.clone())


class WriteWatch(TorchFunctionMode):
    """Copies those of the given tensors whose memory a function of torch may write, before it is called.

    Torch ends the names of what writes in "_"; what has no such name and is none of torch's own functions may write, too.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.copies: list[Copied] = []
        self._watched: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if (address := memory_of(tensor)) is not None:
                self._watched.setdefault(address, []).append(tensor)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give what was copied its values again."""
        for noted in self.copies:
            noted.put_back()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        classes: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._watched and may_write(func, args, kwargs):
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and (address := memory_of(value)) is not None:
                    self.copies += map(copied, self._watched.pop(address, ()))
        return func(*args, **(kwargs or {}))


def memory_of(tensor: Tensor) -> int | None:
    """Return where a tensor's memory lies; None, where it has none that anybody may write."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # sparse, wrapped, or without memory
        return None


def may_write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Tell whether a function, called so, may write to memory that it is given, or hand it on to what may."""
    if (verdict := _verdict(func)) is not None:
        return verdict
    told = kwargs or {}
    if func.__name__ in _EMBEDDINGS:
        max_norm = args[_PLACE_OF_MAX_NORM] if len(args) > _PLACE_OF_MAX_NORM else told.get("max_norm")
        return max_norm is not None
    return told.get("out") is not None or bool(told.get("inplace")) or any(value is True for value in args)


@functools.lru_cache(maxsize=1024)
def _verdict(func: Callable[..., Any]) -> bool | None:
    """Whether a function may write what it is given; None, where its arguments tell."""
    name = getattr(func, "__name__", "_")
    in_place = name.endswith("_") and not name.endswith("__")
    by_operator = name.startswith("__i") and name.endswith("__") and name != "__invert__"
    if in_place or by_operator or name in _HANDING_OUT:
        return True
    if isinstance(func, types.FunctionType):
        return None if func.__module__.partition(".")[0] == "torch" else True
    if not isinstance(func, _FROM_C):  # an operator that somebody registered
        return True
    return False if name.startswith("__") else None
