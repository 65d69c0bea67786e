"""The discretizer for the transforms of ``torch.func`` and for forward-mode derivatives.

The same arithmetic as ``functional``'s, as an ``autograd.Function`` of the form that they take (``setup_context``). Binding its
arguments costs some twenty microseconds a call, so an ordinary training step does without.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pege_fx.errors import SpecError


def transformed(
    name: str,
    quantized: Callable[..., Tensor],
    gradients: Callable[..., tuple[Tensor, Tensor]],
    kept: Callable[..., Tensor] | None,
) -> type[torch.autograd.Function]:
    """Return the discretizer of an estimator as vmap, grad, vjp and jvp take it.

    Args:
        name: of the estimator.
        quantized: y of (x, scale, zero point, inverse, rate, key, q_min, q_max).
        gradients: dL/dx_c and dL/ds of (gradient, x, y, scale, zero point, inverse, strength, q_min, q_max).
        kept: where dy is dx_c, of (x, y, scale, zero point, inverse, q_min, q_max); None for an estimator that is no linear
            map, and has no forward-mode derivative.
    """

    class TransformedFakeQuantize(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(
            x: Tensor,
            scale: Tensor,
            zero_point: Tensor | None,
            inverse: Tensor | None,
            rate: Tensor | None,
            key: Tensor | None,
            strength: Tensor,
            q_min: int,
            q_max: int,
            scale_gradient: float,
        ) -> Tensor:
            return quantized(x, scale, zero_point, inverse, rate, key, q_min, q_max)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, scale, zero_point, inverse, _, _, strength, q_min, q_max, scale_gradient = inputs
            ctx.save_for_backward(x, output, scale, zero_point, inverse, strength)
            ctx.save_for_forward(x, output, scale, zero_point, inverse, strength)  # the same: vmap notes one list alone
            ctx.bounds, ctx.scale_gradient = (q_min, q_max), scale_gradient

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            x, y, scale, zero_point, inverse, strength = ctx.saved_tensors
            grad_x, grad_scale = gradients(grad, x, y, scale, zero_point, inverse, strength, *ctx.bounds)
            return grad_x, grad_scale * ctx.scale_gradient, *(None,) * 8

        @staticmethod
        def jvp(ctx: Any, x_tangent: Tensor | None, scale_tangent: Tensor | None, *_: None) -> Tensor:
            """dy = k * dx_c + (y - k * x_c) / s * ds, k says what is in range: the transpose of ``backward``, without λ."""
            if kept is None:
                raise SpecError(
                    f"the estimator {name} has no forward-mode derivative: it is no linear map of a gradient.\n"
                    "  use reverse mode (torch.func.grad, vjp, jacrev), or train with another estimator."
                )
            x, y, scale, zero_point, inverse, _ = ctx.saved_tensors
            wide = torch.promote_types(x.dtype, torch.float32)
            keep = kept(x, y, scale, zero_point, inverse, *ctx.bounds)
            tangent = torch.zeros_like(x, dtype=wide)
            if x_tangent is not None:
                tangent = tangent + torch.where(keep, x_tangent.to(wide), 0.0)
            if scale_tangent is not None:
                slope = (y.to(wide) - torch.where(keep, x.to(wide), 0.0)) / scale.to(wide)
                tangent = tangent + slope * scale_tangent.to(wide) * ctx.scale_gradient
            return tangent.to(x.dtype)

    TransformedFakeQuantize.__name__ = TransformedFakeQuantize.__qualname__ = f"TransformedFakeQuantize{name}"
    return TransformedFakeQuantize
