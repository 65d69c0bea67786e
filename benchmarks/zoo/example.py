"""What a row of the coverage table runs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A model in training mode and a call of it.

    ``evaluation`` are the arguments for ``eval()``, where they are others; ``note`` says what was done to the model.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    evaluation: tuple[Any, ...] | None = None
    note: str = ""

    def call(self, training: bool) -> Call:
        """A copy of the arguments: models may change theirs."""
        args = self.args if training or self.evaluation is None else self.evaluation
        return copy.deepcopy((args, self.kwargs))

    def other_call(self) -> Call:
        """Other values of the same shapes, for ``eval()``: noise as wide as the numbers were, and whole numbers permuted."""
        args, kwargs = self.call(training=False)
        return _other(args), _other(kwargs)


def _other(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return value.flatten()[torch.randperm(value.numel())].view(value.shape)
        return value.flatten()[torch.randperm(value.numel())].view(value.shape) if value.dtype is not torch.bool else value
    if isinstance(value, dict):
        return {key: _other(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_other(inner) for inner in value)
    return value


@dataclass(frozen=True)
class Case:
    """A row: its name, the family it stands for, and how to make it."""

    name: str
    family: str
    make: Callable[[], Example]
