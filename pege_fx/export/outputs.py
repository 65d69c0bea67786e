"""The results of a model as the outputs of a file: every tensor by a name of its own, whatever holds it."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from pege_fx.errors import ExportError


def named_results(result: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a model's result with its name: its key, field or place, or "output"; None is left out.

    >>> dict(named_results({"out": 1, "aux": (2, None, 3)}))
    {'out': 1, 'aux_0': 2, 'aux_2': 3}
    """
    parts = _parts(result)
    if parts is None:
        if result is not None:
            yield prefix or "output", result
        return
    for name, value in parts:
        start = prefix or ("output" if isinstance(name, int) else "")
        yield from named_results(value, f"{start}_{name}" if start else str(name))


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a container by name, or by place; None for what is no container."""
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else None


def flat_tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result in the order in which ``export_onnx`` writes them."""
    return [value for _, value in named_results(result) if isinstance(value, Tensor)]


def output_names(result: Any) -> list[str]:
    """Name every tensor of a model's result.

    >>> import torch
    >>> output_names({"out": torch.ones(1), "aux": torch.ones(1)}), output_names((torch.ones(1), None, torch.ones(1)))
    (['out', 'aux'], ['output_0', 'output_2'])

    Raises:
        ExportError: for what is neither a tensor nor None.
    """
    names = []
    for name, value in named_results(result):
        if not isinstance(value, Tensor):
            raise ExportError(f"{name} is {value!r}, not a tensor: leave it out, or make it one.")
        names.append(name)
    return names


def given_names(argument: str, names: Sequence[str], count: int, taken: Collection[str] = ()) -> list[str]:
    """Return the names that a user gives; raise ``ExportError`` unless there are ``count`` of them, each its own."""
    found = [names] if isinstance(names, str) else list(names)
    if (
        len(found) != count
        or len({*found, *taken}) != count + len(taken)
        or not all(isinstance(name, str) and name for name in found)
    ):
        raise ExportError(f"{argument}={names!r}: the model has {count}, give a name of its own for each.")
    return found
