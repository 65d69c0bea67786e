"""Estimators: how a gradient passes the discretizer. One class each, an author's or a user's."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pege_fx.numerics.formats import compute_dtype
from pege_fx.numerics.registry import ESTIMATORS


def nothing_if_nan(term: Tensor) -> Tensor:
    """A term of a gradient, or 0 where it is not a number: inf - inf of an element that was not replaced, 0 * inf."""
    return torch.where(term == term, term, 0.0)


class Estimator(ABC):
    """How a gradient passes the discretizer. A subclass names itself and is then known to every policy:

    >>> class Halved(Estimator, name="halved-example"):
    ...     @staticmethod
    ...     def gradient(grad, x, y, keep, span, strength):
    ...         return 0.5 * grad * keep

    ``strength`` says what the last argument of ``gradient`` is: "lambda", the scheduler's λ for weights or for
    activations; or a number, the first value of a 0-d buffer ``strength`` that each site has to itself. ``is_relative``: it
    multiplies a gradient, so that it stays what it is where the loss is scaled. ``has_tangent``: what reaches x_c is r * g and
    terms of the loss's, so that forward mode (``torch.func.jvp``) has r * dx_c. ``kernel``: what the kernels written by hand
    call this gradient, if they know it.
    """

    strength: ClassVar[float | Literal["lambda"]] = "lambda"
    is_relative: ClassVar[bool] = False
    has_tangent: ClassVar[bool] = False
    kernel: ClassVar[str | None] = None
    discretizers: ClassVar[dict[str, Any]]  # by format, see ``discretizer.discretizers_of``

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.discretizers = {}
        cls.kernel = vars(cls).get("kernel")  # of this gradient, and not of what another class made of it
        if name is not None:
            ESTIMATORS.add(name, cls)

    @staticmethod
    @abstractmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        """Return dL/dx_c.

        Args:
            grad: dL/dy, the shape of ``x``.
            x: the continuous values x_c.
            y: the result of the forward pass; equals ``x`` where an element was not replaced.
            keep: bools, (r or not m): the element is in range, or was not replaced.
            span: the width of the grid in units of ``x``, s * (q_max - q_min), broadcastable to ``x``.
            strength: 0-d, see the class.
        """

    @staticmethod
    def kernel_strength(grad: Tensor, x: Tensor, y: Tensor, keep: Callable[[], Tensor], strength: Tensor) -> Tensor:
        """Return the strength with which ``kernel`` computes this gradient, 0-d; ``keep()`` gives ``keep``."""
        return strength


class STE(Estimator, name="ste"):
    """The straight-through estimator: r * g."""

    kernel = "ste"
    has_tangent = True

    @staticmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        return torch.where(keep, grad, 0.0)


class EWGS(Estimator, name="ewgs"):
    """Element-wise gradient scaling (Lee et al., CVPR 2021): r * g * (1 + delta * sign(g) * (x_c - x_q) / span).

    ``delta`` is the buffer ``strength`` of each site; the paper sets it from the trace of the Hessian.
    """

    kernel = "ewgs"
    strength = 1e-3

    @staticmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        scaled = grad + nothing_if_nan(strength * grad.abs() * ((x - y) / span))
        return torch.where(keep, scaled, 0.0)


class PEGE(Estimator, name="pege"):
    """Progressive element-wise gradient estimation: (r or not m) * g + lambda * (x_c - y), lambda in absolute units."""

    kernel = "pege"
    has_tangent = True

    @staticmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        return torch.where(keep, grad, 0.0) + nothing_if_nan(strength * (x - y))


class RelativePEGE(Estimator, name="pege-relative"):
    """PEGE with lambda in units of the site's mean |g|, so that one value serves sites whose gradients differ in size."""

    kernel = "pege-relative"
    is_relative = True
    has_tangent = True

    @staticmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        return torch.where(keep, grad, 0.0) + nothing_if_nan(strength * grad.abs().mean() * (x - y))


def lambda_of_share(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, share: Tensor) -> Tensor:
    """Return the λ with which the sum of |λ (x_c - y)| is ``share`` of the sum of the rest's |gradient|, 0-d.

    Args:
        grad: dL/dy.
        x, y: x_c and y; a difference that is not a number counts as 0.
        keep: bools, (r or not m).
        share: 0-d.
    """
    wide = compute_dtype(x)
    size = nothing_if_nan(x.to(wide) - y.to(wide)).abs().mean().clamp(min=torch.finfo(wide).tiny)
    return share.to(wide) * torch.where(keep, grad.to(wide), 0.0).abs().mean() / size


class SharePEGE(Estimator, name="pege-share"):
    """PEGE with λ as a share: the sum of |λ (x_c - y)| over a site is λ's schedule times the sum of the rest's |gradient|.

    So the schedule means the same for every site, loss, batch size and scale of the weights.
    """

    kernel = "pege"
    is_relative = True
    has_tangent = True

    @staticmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        return torch.where(keep, grad, 0.0) + nothing_if_nan(lambda_of_share(grad, x, y, keep, strength) * (x - y))

    @staticmethod
    def kernel_strength(grad: Tensor, x: Tensor, y: Tensor, keep: Callable[[], Tensor], strength: Tensor) -> Tensor:
        return lambda_of_share(grad, x, y, keep(), strength)
