"""Where a group of sites stands in its schedule: tensors that a scheduler writes and every site of the group reads."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from pege_fx.kernels.inductor import is_traced
from pege_fx.numerics.masks import refresh_key


class ScheduleState(nn.Module):
    """Where a group of sites stands: 0-d tensors on the model's device, updated in place by the scheduler.

    ``rate`` p; ``weight_lambda`` and ``activation_lambda`` λ (absolute units), float32; ``refresh_key`` (int32, from the
    refresh count). ``is_complete`` knows p = 1 without asking the device, if ``set_rate`` wrote it last.
    They start fully quantized with λ = 0 and are not part of a ``state_dict``: the scheduler's is.

    ``loss_scale`` is the factor of a ``GradScaler`` that the scheduler follows, if it follows one (``is_scaled``).

    They are kept as bits, since ``half()`` rounds whatever is floating point, and float16 has no 1e-8.

    An average of a model (``AveragedModel``, an EMA of a ``state_dict``) is a copy that somebody writes into. It stands where
    its model does, whether buffers are copied, averaged, or left out as a ``state_dict`` leaves these: a copy without a
    scheduler, whose buffers or whose sites' somebody wrote, takes the values of the state that it was copied from.
    """

    rate_bits: Tensor
    weight_lambda_bits: Tensor
    activation_lambda_bits: Tensor
    loss_scale_bits: Tensor
    refresh_key: Tensor
    touched: Tensor

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group
        self.rank = 0  # which part of a global batch this process sees; no buffer, or DDP would make it the first one's
        self.is_scaled = False
        for name, value in (("rate", 1.0), ("weight_lambda", 0.0), ("activation_lambda", 0.0), ("loss_scale", 1.0)):
            self.register_buffer(f"{name}_bits", torch.tensor(value).view(torch.int32), persistent=False)
        self._complete_version = version_of(self.rate_bits)
        key = torch.tensor(refresh_key(0), dtype=torch.int32)
        self.register_buffer("refresh_key", key, persistent=False)
        self.register_buffer("touched", torch.tensor(0, dtype=torch.int32), persistent=False)  # which nobody here writes
        self._original: weakref.ref[ScheduleState] | None = None
        self._touched_version: int | None = None

    @property
    def rate(self) -> Tensor:
        self._follow_original()
        return self.rate_bits.view(torch.float32)

    def set_rate(self, rate: float) -> None:
        self._original = None  # there is a schedule of its own
        self.rate.fill_(rate)
        self._complete_version = version_of(self.rate_bits) if rate == 1 else None

    @property
    def is_complete(self) -> bool:
        self._follow_original()
        return self._complete_version is not None and self._complete_version == version_of(self.rate_bits)

    def notice_writes(self) -> None:
        """Somebody wrote buffers of a site: if this is a copy, the model is an average."""
        self._touched_version = None

    def _follow_original(self) -> None:
        """Take the values of the state that this one was copied from, if somebody wrote buffers since."""
        if self._original is None or is_traced() or version_of(self.touched) == self._touched_version:
            return
        self._touched_version = version_of(self.touched)
        if (original := self._original()) is None:
            return
        self._complete_version = None
        is_complete = original.is_complete
        with torch.no_grad():
            for mine, other in zip(self.buffers(), original.buffers(), strict=True):
                if mine is not self.touched:
                    mine.copy_(other)
        if is_complete:
            self._complete_version = version_of(self.rate_bits)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors count their versions anew, and what it was copied from is nothing to save.
        return {**vars(self), "_complete_version": None, "_original": None, "_touched_version": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "touched" not in self._buffers:  # pickled before there was one
            self.register_buffer("touched", torch.zeros_like(self.refresh_key), persistent=False)
            self._original = self._touched_version = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScheduleState":
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._original, copied._touched_version = weakref.ref(self), version_of(copied.touched)
        return copied

    @property
    def weight_lambda(self) -> Tensor:
        return self.weight_lambda_bits.view(torch.float32)

    @property
    def activation_lambda(self) -> Tensor:
        return self.activation_lambda_bits.view(torch.float32)

    @property
    def loss_scale(self) -> Tensor:
        return self.loss_scale_bits.view(torch.float32)

    def extra_repr(self) -> str:
        return f"group={self.group!r}"


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written, or None where nobody counts."""
    try:
        return None if tensor.is_inference() else tensor._version
    except RuntimeError:  # under vmap
        return None
