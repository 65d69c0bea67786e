"""Modules that stand in a traced graph for what a graph does not hold: the training mode, code that stays Python."""

from typing import Any

import torch.fx
from torch import nn

from pege_fx.errors import InputError

TRAINING_MODE = "training_mode"
PYTHON_FORWARD = "python_forward"


class TrainingMode(nn.Module):
    """Returns its own ``training``: what ``self.training`` becomes in a traced graph."""

    def forward(self) -> bool:
        return self.training


def select_by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """Return what ``if self.training`` would have left: both sides are values of the graph."""
    return in_training if training else in_evaluation


@torch.fx.has_side_effect
def check_argument(value: Any, name: str, keys: tuple[Any, ...] | None = None) -> None:
    """Raise ``InputError`` unless an argument is what the graph was traced for: None, or a collection of these keys.

    Positional extras (``*args``) are known by their number: the keys are 0, 1, ...
    """
    if keys is None:
        if value is not None:
            raise InputError(
                f"{name} was None when the model was traced, and is {type(value).__name__} now.\n"
                "  give it in example_inputs or example_kwargs of prepare."
            )
    elif (found := tuple(value) if isinstance(value, dict) else tuple(range(len(value)))) != keys:
        raise InputError(f"{name} had {list(keys)} when the model was traced, now it has {list(found)}: give examples of that.")


class PythonForward(nn.Module):
    """Runs the ``forward`` of a module that can not be traced, on children and tensors that the graph hands in.

    The graph owns those under their own names, so that ``state_dict``, ``to()`` and copies see them; the module here
    is the code alone.
    """

    def __init__(self, code: nn.Module) -> None:
        super().__init__()
        self._code = (code,)  # in a tuple: no child, so no key of it is doubled

    def forward(
        self, owned: dict[str, Any], args: tuple[Any, ...], extra: tuple[Any, ...], kwargs: dict[str, Any], more: dict[str, Any]
    ) -> Any:
        (code,) = self._code
        code.training = self.training
        for name, value in owned.items():
            if getattr(code, name, None) is not value:
                setattr(code, name, value)
        return code.forward(*args, *extra, **kwargs, **more)
