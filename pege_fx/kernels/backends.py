"""The kernels written by hand, and which of them computes on a device.

A backend is a module (or any object) with the two functions of ``KernelBackend``. What it does not serve it answers with None:
then a function compiled by ``inductor``, or plain operations, compute the same.
"""

import functools
from typing import Protocol

from torch import Tensor

from pege_fx.kernels import c_kernels
from pege_fx.kernels.inductor import fits_a_kernel


class KernelBackend(Protocol):
    """One call forward, one backward, equal to the definition in ``numerics.discretizer``: y bit by bit, gradients to rounding.

    ``x`` is dense; ``scale``, ``zero_point`` and ``inverse`` (which x is multiplied by instead of being divided by the scale)
    are one number, or one for each index of its first dimension. ``rate`` and ``key`` are None where every element is replaced.
    """

    ESTIMATORS: frozenset[str]

    def forward(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        inverse: Tensor | None,
        rate: Tensor | None,
        key: Tensor | None,
        q_min: int,
        q_max: int,
    ) -> Tensor | None:
        """Return y in the memory layout of ``x``, or None."""
        ...

    def backward(
        self,
        estimator: str,
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        inverse: Tensor | None,
        strength: Tensor,
        q_min: int,
        q_max: int,
    ) -> tuple[Tensor, Tensor] | None:
        """Return dL/dx_c and dL/ds, or None. ``estimator`` is one of ``ESTIMATORS``."""
        ...


@functools.cache
def _backend_of(device: str) -> KernelBackend | None:
    """Return the backend of a kind of device; Triton takes a while to import, and is not everywhere."""
    if device == "cpu":
        return c_kernels
    if device == "cuda":
        try:
            from pege_fx.kernels import triton_kernels
        except ImportError:
            return None
        return triton_kernels
    return None


def backend_for(x: Tensor) -> KernelBackend | None:
    """Return the kernels that may compute on ``x``."""
    return _backend_of(x.device.type) if fits_a_kernel(x) else None
