"""Comparing what two calls gave: any tree of results leaf by leaf, and runs that start from the same random numbers."""

import math
import random
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ATOMS = (Tensor, nn.Module, type, str, bytes, int, float, complex, bool, type(None), types.FunctionType, types.MethodType)


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a tree with where it is, and the type of every container: two trees that agree in all are equal.

    Containers are mappings, lists, tuples, dataclasses, and objects with attributes, such as a key/value cache.
    """
    yield from _leaves(name, value, set())


def _leaves(name: str, value: Any, above: set[int]) -> Iterator[tuple[str, Any]]:
    parts = None if isinstance(value, _ATOMS) or id(value) in above else _parts(value)
    if parts is None:
        yield name, value
        return
    yield f"the type of {name}", _kind(value)
    for suffix, part in parts:
        yield from _leaves(f"{name}{suffix}", part, above | {id(value)})


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a container by what stands behind its name to reach them; None for what is none."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (tuple, list)):
        return [(f"[{number}]", part) for number, part in enumerate(value)]
    if is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name, None)) for field in fields(value)]
    attributes = getattr(value, "__dict__", None)
    return None if attributes is None else [(f".{key}", part) for key, part in attributes.items()]


def _kind(value: Any) -> str:
    for plain in (dict, list):  # fx returns subclasses of its own
        if isinstance(value, plain) and type(value).__module__.startswith("torch.fx"):
            return plain.__name__
    return "tuple" if isinstance(value, torch.Size) else type(value).__name__


def tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a tree, with where it is.

    >>> [where for where, _ in tensors("y", {"a": torch.ones(1), "b": [torch.ones(1), 2]})]
    ["y['a']", "y['b'][0]"]
    """
    return ((where, leaf) for where, leaf in leaves(name, value) if isinstance(leaf, Tensor))


def same(x: Any, y: Any) -> bool:
    """Tell whether two leaves are equal: tensors bit for bit (NaN to NaN), numbers and texts by value, else by type."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return _same_tensors(x, y)
    if isinstance(x, (bool, int, float, complex, str, bytes)):
        return type(x) is type(y) and bool(x == y or (x != x and y != y))
    return type(x) is type(y)


def _same_tensors(x: Tensor, y: Tensor) -> bool:
    if (x.shape, x.dtype, x.layout, x.device) != (y.shape, y.dtype, y.layout, y.device):
        return False
    if x.is_meta or x.is_quantized or x.is_nested:
        return True  # no values to look at, or none that can be compared
    x, y = (value.to_dense() if value.layout is not torch.strided else value for value in (x, y))
    if torch.equal(x, y):
        return True
    floating = x.is_floating_point() or x.is_complex()
    return floating and bool(((x == y) | ((x != x) & (y != y))).all())


def difference(x: Tensor, y: Tensor) -> Tensor:
    """Return |x - y|, elementwise: 0 where both are the same infinity or NaN, infinite where only one is not finite."""
    equal = (x == y) | (x.isnan() & y.isnan())
    wide = torch.complex128 if x.is_complex() else torch.float64
    return torch.where(equal, 0.0, (x.to(wide) - y.to(wide)).abs().nan_to_num(math.inf, math.inf))


def largest(x: Tensor) -> float:
    """Return the largest finite absolute value, 0 if there is none."""
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


@contextmanager
def same_random_numbers(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Within, the generators of torch, Python and NumPy start from one seed; after it they are as they were.

    Args:
        devices: what else draws beside the processor.
    """
    python, arrays = random.getstate(), numpy.random.get_state()
    accelerators = {device for device in devices if device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index or 0 for device in accelerators]):
        try:
            _seed_torch(bool(accelerators))
            random.seed(0)
            numpy.random.seed(0)
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


def _seed_torch(on_cuda: bool) -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes as long as a small model where CUDA is not in use
    if on_cuda:
        torch.cuda.manual_seed_all(0)


class UnorderedDraws(TorchFunctionMode):
    """Every function of torch starts from one seed: what it draws follows from the call alone, not from those before it.

    A graph without what nobody reads draws less than the model, and the rest of its masks would be others.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _seed_torch(bool(torch.cuda.is_initialized()))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))
