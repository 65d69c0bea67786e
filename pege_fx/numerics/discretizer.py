"""The discretizer: forward and backward of fake quantization as ``autograd.Function``s, and the choice of a kernel for them.

``functional.fake_quantize`` is the way in, and says what is computed. Here it is once more as plain operations, which a whole
model's ``torch.compile`` traces through. In eager mode kernels compute the same: those written by hand where they serve, else
these operations compiled locally.
"""

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pege_fx.kernels.backends import backend_for
from pege_fx.kernels.compiled_view import view_of
from pege_fx.kernels.inductor import LocalKernel, fits_a_kernel, has_memory, worth_compiling
from pege_fx.numerics.estimators import Estimator, nothing_if_nan
from pege_fx.numerics.formats import Format, compute_dtype
from pege_fx.numerics.masks import channels_last_index, index_like, is_replaced
from pege_fx.numerics.transforms import transformed


class Grid(NamedTuple):
    """What an element is rounded to, in units of the scale: whole numbers, or the levels of another format.

    Kernels take whole numbers, whose bounds are arguments; every other format is a constant of functions of its own.
    """

    q_min: int
    q_max: int
    levels: Format | None = None

    @classmethod
    def of(cls, number_format: Format) -> "Grid":
        """Return the grid of a format."""
        if number_format.is_integer:
            low, high = number_format.limits
            return cls(int(low), int(high))
        return cls(0, 0, number_format)

    @property
    def width(self) -> float:
        """From the lowest to the highest level."""
        low, high = (self.q_min, self.q_max) if self.levels is None else self.levels.limits
        return high - low


# --- as plain operations -------------------------------------------------------------------------------------


def divided(x: Tensor, scale: Tensor, inverse: Tensor | None) -> Tensor:
    """``x`` in units of the scale; some definitions multiply by an inverse, which rounds otherwise."""
    return x / scale if inverse is None else x * inverse


def unclamped(x: Tensor, scale: Tensor, zero_point: Tensor | None, inverse: Tensor | None = None) -> Tensor:
    """The integer code of each element, beyond the bounds too."""
    codes = torch.round(divided(x, scale, inverse))
    return codes if zero_point is None else codes + zero_point


def value_of(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """s * (codes - z)."""
    return (codes if zero_point is None else codes - zero_point) * scale


def _forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    inverse: Tensor | None,
    rate: Tensor | None,
    key: Tensor | None,
    channels_last: bool,
    q_min: int,
    q_max: int,
    *,
    levels: Format | None,
) -> Tensor:
    """y; with ``channels_last``, ``x`` is (batch, positions, channels) of a tensor (batch, channels, positions)."""
    wide = x.to(compute_dtype(x))
    step = scale.to(wide.dtype)
    if levels is None:
        y = value_of(unclamped(wide, step, zero_point, inverse).clamp(q_min, q_max), step, zero_point)
    else:
        y = levels.round(divided(wide, step, inverse)) * step
    # Where it has that dtype, ``to`` gives y a second name, and torch 2.11's compiler loses the gradients of the first.
    if y.dtype != x.dtype:
        y = y.to(x.dtype)
    if rate is None or key is None:
        return y
    index = channels_last_index(x) if channels_last else index_like(x)
    return torch.where(is_replaced(index, key, rate), y, x)


def _is_kept(x: Tensor, y: Tensor, scale: Tensor, zero_point: Tensor | None, inverse: Tensor | None, grid: Grid) -> Tensor:
    """(r or not m): the elements that are in range, or were not replaced."""
    wide = compute_dtype(x)
    x_wide, step = x.to(wide), scale.to(wide)
    if grid.levels is not None:
        return grid.levels.covers(divided(x_wide, step, inverse)) | (x == y)
    codes = unclamped(x_wide, step, zero_point, inverse)
    return ((codes >= grid.q_min) & (codes <= grid.q_max)) | (x == y)


def _backward(
    estimator: type[Estimator],
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    inverse: Tensor | None,
    strength: Tensor,
    *,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """dL/dx_c and dL/ds, the latter in the shape of ``scale``."""
    dtype, wide = x.dtype, compute_dtype(x)
    grad, x, y, step = grad.to(wide), x.to(wide), y.to(wide), scale.to(wide)
    keep = _is_kept(x, y, step, zero_point, inverse, grid)
    span = step.abs() * grid.width
    grad_x = estimator.gradient(grad, x, y, keep, span, strength.to(wide)).to(dtype)
    moved = nothing_if_nan(y - torch.where(keep, x, 0.0))
    slope = (grad * moved).sum_to_size(scale.shape)  # divided once, not for each element
    return grad_x, (slope / step).to(scale.dtype)


# --- by kernels ----------------------------------------------------------------------------------------------


@functools.cache
def _forward_kernel(levels: Format | None) -> LocalKernel:
    def forward_of(*args: Any) -> Tensor:
        return _forward(*args, levels=levels)

    return LocalKernel(forward_of)


def quantized(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    inverse: Tensor | None,
    rate: Tensor | None,
    key: Tensor | None,
    grid: Grid,
) -> Tensor:
    """y, by a kernel where one fits, in the memory layout of ``x``."""
    q_min, q_max, levels = grid
    if levels is None and (backend := backend_for(x)) is not None:
        y = backend.forward(x, scale, zero_point, inverse, rate, key, q_min, q_max)
        if y is not None:
            return y
    view = view_of(x, scale, zero_point, inverse) if worth_compiling(x) else None
    if view is None:
        return _forward(x, scale, zero_point, inverse, rate, key, False, q_min, q_max, levels=levels)
    numbers = view.of_scales(scale, zero_point, inverse)
    kernel = _forward_kernel(levels)
    return view.back(kernel(view.of(x), *numbers, rate, key, view.order is not None, q_min, q_max), x)


# What puts tiles back in their places.
_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "TransposeBackward0"}


def node_to_make_again(y: Tensor) -> Any:
    """Return the autograd node of the discretizer that made a tensor and did not keep it; None for any other tensor."""
    if type(y) is not Tensor or y.numel() == 0 or y.is_meta:
        return None
    node: Any = y.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node if getattr(node, "recompute", False) else None


def made_again(node: Any) -> Tensor:
    """Return y of a discretizer's autograd node that did not keep it; from the first call to its backward it keeps it."""
    if node.remembered is None:
        saved = _Saved(*node.saved_tensors)  # once: activation checkpoints give them once
        with torch.no_grad():
            y = quantized(saved.x, saved.scale, saved.zero_point, saved.inverse, saved.rate, saved.key, node.grid)
        node.remembered = saved._replace(y=y)
    return cast(Tensor, node.remembered.y)


def continuous_and_replaced(node: Any) -> tuple[Tensor, Tensor]:
    """Return x_c and y of a discretizer's autograd node, while it has them."""
    if node.recompute:
        made_again(node)
    x, y = (node.remembered or node.saved_tensors)[:2]
    return x, y


def parts_of_gradient(estimator: type[Estimator], node: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return dL/dx_c without an estimator's strength, and what the strength adds to it, in float64 (float32 on MPS).

    For a hook that runs before the node's backward, which finds there what is unpacked here: activation checkpoints give
    saved tensors once. The small part is the difference of two large ones, hence float64.

    Args:
        estimator: of the site.
        node: a discretizer's autograd node.
        grad: dL/dy.
    """
    if node.recompute:
        made_again(node)
    node.remembered = node.remembered or _Saved(*node.saved_tensors)
    saved, width = node.remembered, node.grid.width
    keep = _is_kept(saved.x, saved.y, saved.scale, saved.zero_point, saved.inverse, node.grid)
    wide = torch.float32 if saved.x.device.type == "mps" else torch.float64
    parts = (grad, saved.x, saved.y, saved.scale, saved.strength)
    grad, x, y, scale, strength = (value.to(wide) for value in parts)
    plain = estimator.gradient(grad, x, y, keep, scale.abs() * width, torch.zeros_like(strength))
    return plain, estimator.gradient(grad, x, y, keep, scale.abs() * width, strength) - plain


# --- for autograd --------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What a discretizer keeps for backward: y, or what it takes to make it again."""

    x: Tensor
    y: Tensor
    scale: Tensor
    zero_point: Tensor | None
    inverse: Tensor | None
    strength: Tensor
    rate: Tensor | None
    key: Tensor | None


class Discretizers(NamedTuple):
    """The discretizer with the backward of one estimator: the ordinary one, and one for the transforms of ``torch.func``."""

    ordinary: type[torch.autograd.Function]
    transformed: type[torch.autograd.Function]


def discretizers_of(estimator: type[Estimator], levels: Format | None) -> Discretizers:
    """Return the discretizers of an estimator on a format (None: whole numbers).

    They are classes, made once, which compilers see through; what makes them they do not.
    """
    name = "" if levels is None else levels.name
    known, found = estimator.discretizers.get(name, (None, None))
    if found is None or known is not levels:  # a format that was defined anew
        found = _discretizers(estimator, levels)
        estimator.discretizers[name] = levels, found
    return cast(Discretizers, found)


def _discretizers(estimator: type[Estimator], levels: Format | None) -> Discretizers:
    def backward_of(*args: Any) -> tuple[Tensor, Tensor]:
        *tensors, q_min, q_max = args
        return _backward(estimator, *tensors, grid=Grid(q_min, q_max, levels))

    backward_kernel = LocalKernel(backward_of)

    def gradients_of(
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        inverse: Tensor | None,
        strength: Tensor,
        q_min: int,
        q_max: int,
    ) -> tuple[Tensor, Tensor]:
        """dL/dx_c and dL/ds, by a kernel where one fits."""
        args = (scale, zero_point, inverse, strength, q_min, q_max)
        if not (fits_a_kernel(x) and has_memory(grad)):  # of several gradients at once, autograd makes one by vmap
            return backward_of(grad, x, y, *args)
        if levels is None and (backend := backend_for(x)) is not None and estimator.kernel in backend.ESTIMATORS:
            name, grid = str(estimator.kernel), Grid(q_min, q_max)
            size = estimator.kernel_strength(grad, x, y, lambda: _is_kept(x, y, scale, zero_point, inverse, grid), strength)
            made = backend.backward(name, grad, x, y, scale, zero_point, inverse, size, q_min, q_max)
            if made is not None:
                return made
        view = view_of(x, scale, zero_point, inverse) if worth_compiling(x) else None
        if view is None:
            return backward_of(grad, x, y, *args)
        numbers = view.of_scales(scale, zero_point, inverse)
        flat, sums = backward_kernel(view.of(grad), view.of(x), view.of(y), *numbers, strength, q_min, q_max)
        return view.back(flat, x), sums.view(scale.shape)

    class FakeQuantize(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
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
            recompute: bool,
        ) -> Tensor:
            grid = Grid(q_min, q_max, levels)
            y = quantized(x, scale, zero_point, inverse, rate, key, grid)
            of_y = (None, scale, zero_point, inverse, strength, rate, key)
            ctx.save_for_backward(x, *(of_y if recompute else (y, *of_y[1:5], None, None)))
            ctx.grid, ctx.scale_gradient, ctx.recompute, ctx.remembered = grid, scale_gradient, recompute, None
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            if ctx.recompute:
                made_again(ctx)
            x, y, scale, zero_point, inverse, strength, rate, key = ctx.remembered or ctx.saved_tensors
            bounds = ctx.grid[:2]
            if ctx.recompute:
                ctx.remembered = None
                if torch.is_grad_enabled():  # for a second derivative y is a function of x, which adds no lambda again
                    nothing = torch.zeros_like(strength)
                    more = (rate, key, nothing, *bounds, ctx.scale_gradient, False)
                    y = FakeQuantize.apply(x, scale, zero_point, inverse, *more)
            grad_x, grad_scale = gradients_of(grad, x, y, scale, zero_point, inverse, strength, *bounds)
            wanted = ctx.needs_input_grad
            scaled = grad_scale * ctx.scale_gradient if wanted[1] else None
            return grad_x if wanted[0] else None, scaled, *(None,) * 9

    name = estimator.__name__ + ("" if levels is None else "".join(filter(str.isalnum, levels.name)).title())
    FakeQuantize.__name__ = FakeQuantize.__qualname__ = f"FakeQuantize{name}"

    def kept(
        x: Tensor, y: Tensor, scale: Tensor, zero_point: Tensor | None, inverse: Tensor | None, q_min: int, q_max: int
    ) -> Tensor:
        return _is_kept(x, y, scale, zero_point, inverse, Grid(q_min, q_max, levels))

    def forward_of(x: Tensor, scale: Tensor, *args: Any) -> Tensor:
        zero_point, inverse, rate, key, q_min, q_max = args
        return quantized(x, scale, zero_point, inverse, rate, key, Grid(q_min, q_max, levels))

    return Discretizers(
        FakeQuantize, transformed(estimator.__name__, forward_of, gradients_of, kept if estimator.has_tangent else None)
    )
