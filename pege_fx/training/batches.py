"""What a batch is, wherever the library takes batches: ``calibrate``, ``sensitivity``, ``report``, ``verify_export``, ...

| a batch | ``forward`` is called with |
|---|---|
| a tensor, a NumPy array, any other object | it, as the one argument |
| a tuple or list | its positional arguments; surplus ones, such as labels, are left out |
| a mapping whose keys ``forward`` takes (a dict, a ``BatchEncoding``) | keyword arguments |
| another mapping, where ``forward`` has one positional argument | it, as that argument |
| ``(args, kwargs)``: a tuple or list, and a mapping whose keys ``forward`` takes | both |

``batches`` is an iterable of those (a list, a ``DataLoader``, a generator); a single tensor, array or mapping is one batch.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pege_fx.errors import ConvertError, InputError
from pege_fx.modules.stages import unwrapped

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def batches_of(batches: Any, caller: str) -> Iterable[Any]:
    """Return an iterable of batches: what was given, or a list of the single one that was given.

    Args:
        batches: an iterable of batches, or a single tensor, array or mapping.
        caller: name of the function that was given them.

    Raises:
        InputError: if there is nothing to iterate over.
    """
    if isinstance(batches, (Tensor, Mapping)) or _is_array(batches):
        return [batches]  # iterating would take it apart: samples without their dimension, keys without values
    if isinstance(batches, (str, bytes)) or not isinstance(batches, Iterable):
        raise InputError(f"{caller} got {type(batches).__name__} for batches: give a list, a DataLoader or another iterable.")
    return batches


def each_batch(batches: Any, caller: str) -> Iterator[Any]:
    """Yield batches one by one; ``InputError`` if there is none, or nothing to iterate over."""
    empty = True
    for batch in batches_of(batches, caller):
        empty = False
        yield batch
    if empty:
        raise InputError(f"{caller} got no batch: give at least one.")


def as_arguments(model: nn.Module, batch: Any) -> Call:
    """Return a batch as positional and keyword arguments of ``model.forward``.

    Args:
        model: whose ``forward`` says what it takes.
        batch: as the table at the top of this file says.

    Raises:
        InputError: for a mapping with keys that ``forward`` does not take.

    >>> as_arguments(nn.Linear(2, 2), (torch.zeros(1, 2), "label"))
    ((tensor([[0., 0.]]),), {})
    """
    takes = _Takes(unwrapped(model).forward)  # a wrapper's takes anything
    if isinstance(batch, Mapping):
        if takes.all_of(batch):
            return (), _as_tensors(dict(batch))
        if takes.positions == 1:
            return (batch,), {}
        raise InputError(takes.refusal(batch))
    if not isinstance(batch, (tuple, list)):
        return (_as_tensor(batch),), {}
    if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], Mapping) and takes.all_of(batch[1]):
        return tuple(map(_as_tensor, batch[0])), _as_tensors(dict(batch[1]))
    return tuple(map(_as_tensor, batch[: takes.positions])), {}


class _Takes:
    """What a ``forward`` takes, by its signature."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        parameters = inspect.signature(forward).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        self.any_name = inspect.Parameter.VAR_KEYWORD in kinds
        self.names = [parameter.name for parameter in parameters if parameter.kind not in (
            inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        )]  # fmt: skip
        count = sum(parameter.kind in _POSITIONAL for parameter in parameters)
        self.positions = None if inspect.Parameter.VAR_POSITIONAL in kinds else count

    def all_of(self, batch: Mapping[Any, Any]) -> bool:
        """Whether every key is the name of an argument."""
        return all(isinstance(key, str) and (self.any_name or key in self.names) for key in batch)

    def refusal(self, batch: Mapping[Any, Any]) -> str:
        """Say which keys are none."""
        surplus = [str(key) for key in batch if key not in self.names]
        return (
            f"a batch has {', '.join(surplus)}, which forward does not take.\n"
            f"  it takes {', '.join(self.names)}: leave the rest out, or give a tuple."
        )


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")  # who has an array has imported it
    return numpy is not None and isinstance(value, numpy.ndarray)


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if _is_array(value) else value


def _as_tensors(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _as_tensor(value) for name, value in values.items()}


def call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a model; ``InputError`` with the shapes of its inputs if it fails."""
    try:
        return model(*args, **kwargs)
    except ConvertError:  # of a forward method, which is at fault whatever the inputs
        raise
    except Exception as error:
        shapes = [
            tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in (*args, *kwargs.values())
        ]
        raise InputError(f"the model fails on inputs {shapes}: {type(error).__name__}: {error}") from error
