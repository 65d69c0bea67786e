"""The arithmetic of fake quantization, on tensors alone: grids, masks, estimators.

Forward, for a scale s > 0, zero point z and integer bounds q_min ... q_max:

    x_int = clamp(round(x_c / s) + z, q_min, q_max)        x_q = s * (x_int - z)

Progressive replacement (PEGE, arXiv 2509.00097), at rate p with u uniform in [0, 1) for each element:

    m = 1[u < p]            y = m * x_q + (1 - m) * x_c

Backward, with g = dL/dy and r = 1[q_min <= round(x_c / s) + z <= q_max]; where m = 0 every estimator hands on g:

    STE    dL/dx_c = r * g
    EWGS   dL/dx_c = r * g * (1 + delta * sign(g) * (x_c - x_q) / (s * (q_max - q_min)))
    PEGE   dL/dx_c = r * g + lambda * (x_c - x_q)
    scale  dL/ds   = sum over m = 1 of g * (x_q - r * x_c) / s          (LSQ's, by the chain rule)

Because y = x_c wherever m = 0, all of these follow from x_c and y: no mask is kept for backward.
"""

import functools
import zlib
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pege_fx.errors import SpecError
from pege_fx.kernels import c_kernels
from pege_fx.kernels.inductor import LocalKernel, fits_a_kernel, has_memory, worth_compiling
from pege_fx.numerics.spec import ESTIMATORS, QuantSpec, bounds_of
from pege_fx.numerics.transforms import transformed

# --- masks: a counter hash -----------------------------------------------------------------------------------

_MIX_1, _MIX_2 = 0x21F0AAAD, 0xD35A2D97
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: multiples of it lie as evenly apart as any
_BITS_OF_U = 24  # what float32 holds exactly


def as_int32(value: int) -> int:
    """The signed 32-bit integer with the same bits as ``value`` mod 2**32."""
    return (value + 2**31) % 2**32 - 2**31


def mix32(value: int) -> int:
    """Mix a 32-bit integer (lowbias32's finalizer with its improved constants), as Python integers.

    >>> mix32(0), mix32(1)
    (0, 114555507)
    """
    value &= 0xFFFFFFFF
    value = ((value ^ value >> 16) * _MIX_1) & 0xFFFFFFFF
    value = ((value ^ value >> 15) * _MIX_2) & 0xFFFFFFFF
    return value ^ value >> 15


def site_key(seed: int, site: str) -> int:
    """Return the hash key of a site as a signed 32-bit integer, from the run's seed and the site's name."""
    return as_int32(mix32(mix32(zlib.crc32(site.encode())) ^ mix32(seed + 0x9E3779B9)))


def refresh_key(refresh: int) -> int:
    """Return what a refresh count (0, 1, ...) adds to every site's key, as a signed 32-bit integer."""
    return as_int32(mix32(refresh * 0x9E3779B9))


def _hashed(number: Tensor, key: Tensor) -> Tensor:
    """The hash of every element's number (int32) under a 0-d key, see ``uniform``.

    ``mix32`` of consecutive numbers is correlated (r = 0.02 at some lags): its first round barely spreads differences in
    the upper bits. Multiples of ``_GOLDEN`` leave no two elements of a tensor that differ in so few. The key between the
    rounds keeps two keys from giving one sequence, moved along. ``>>`` keeps the sign: the masks make it a logical shift.
    """
    bits = (number + key) * as_int32(_GOLDEN)
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * as_int32(_MIX_1)
    bits = (bits ^ (bits >> 15 & 0x1FFFF) ^ (key * as_int32(_GOLDEN))) * as_int32(_MIX_2)
    return bits ^ (bits >> 15 & 0x1FFFF)


def uniform(key: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the u of every element: float32 in [0, 1) in steps of 2**-24.

    Element i (counted in row-major order whatever the memory layout) gets the upper bits of ``mix32((i + key) * G)`` with
    ``key * G`` xored in between its two rounds, G = 0x9E3779B9: a function of the key and of i alone, hence the same in
    eager and compiled code, on every device, in every recomputation. No two elements are correlated.

    Args:
        key: int32 tensor, see ``site_key`` and ``refresh_key``: 0-d, or two of which the second is the number of the first
            element, for a part of something larger.
        shape: shape of the result; the result is on the key's device.
    """
    return _top_bits(row_major_index(shape, key.device), key).to(torch.float32) * 2.0**-_BITS_OF_U


def row_major_index(shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Number the elements of a shape: 0, 1, ... in row-major order, int32."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)


def _index_like(x: Tensor) -> Tensor:
    """``row_major_index`` in the memory layout of ``x``: what is made from it should look like what it would be without us."""
    return torch.zeros_like(x, dtype=torch.int32) + row_major_index(x.shape, x.device)


def _channels_last_index(x: Tensor) -> Tensor:
    """``row_major_index`` of a tensor (batch, channels, positions), given as ``x`` (batch, positions, channels)."""
    batch, position, channel = (
        torch.arange(size, dtype=torch.int32, device=x.device).view(shape)
        for size, shape in zip(x.shape, ((-1, 1, 1), (-1, 1), (-1,)), strict=True)
    )
    return (batch * x.shape[2] + channel) * x.shape[1] + position


def _top_bits(index: Tensor, key: Tensor) -> Tensor:
    """2**24 * u of the elements with these numbers, int32."""
    bits = _hashed(index, key) if key.ndim == 0 else _hashed(index + key[1], key[0])
    top: Tensor = bits >> (32 - _BITS_OF_U) & (2**_BITS_OF_U - 1)
    return top


def _is_replaced(index: Tensor, key: Tensor, rate: Tensor) -> Tensor:
    """u < p, compared as integers: a conversion for each element would cost more than the comparison."""
    replaced: Tensor = _top_bits(index, key) < torch.ceil(rate.to(torch.float32) * 2**_BITS_OF_U).to(torch.int32)
    return replaced


def replacement_mask(key: Tensor, rate: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the mask m = 1[u < p] as bools: True where the quantized value replaces the continuous one."""
    return _is_replaced(row_major_index(shape, key.device), key, rate)


# --- grids ---------------------------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """Codes and scales are computed in float32 at least, whatever the dtype of the tensor."""
    return torch.promote_types(x.dtype, torch.float32)


def _unclamped(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    codes = torch.round(x / scale)
    return codes if zero_point is None else codes + zero_point


def _value(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return (codes if zero_point is None else codes - zero_point) * scale


def codes_of(
    x: Tensor,
    scale: Tensor,
    bounds: tuple[int, int],
    zero_point: Tensor | None = None,
    interval: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the integer codes of ``x``, still as floating point: clamp(round(x / s) + z, q_min, q_max).

    Args:
        x: any shape; half types are computed in float32.
        scale, zero_point: broadcast to ``x``.
        bounds: (q_min, q_max).
        interval: (lower, width); ``x`` becomes (x - lower) / width first, as the learned interval does.
    """
    x = x.to(compute_dtype(x))
    if interval is not None:
        x = (x - interval[0]) / interval[1]
    return _unclamped(x, scale.to(x.dtype), zero_point).clamp(*bounds)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    lower: Tensor | None = None,
    width: Tensor | None = None,
    *,
    bits: int,
    signed: bool,
    narrow: bool = False,
) -> Tensor:
    """Return the codes of ``x`` as int8 (signed) or uint8 (unsigned): a node of a converted graph."""
    sequence: Any = x
    if isinstance(sequence, PackedSequence):  # what goes into a recurrent layer comes out as it is
        data = quantize(sequence.data, scale, zero_point, lower, width, bits=bits, signed=signed, narrow=narrow)
        return cast(Tensor, sequence._replace(data=data))
    interval = None if lower is None or width is None else (lower, width)
    bounds = bounds_of(bits, signed=signed, narrow=narrow)
    return codes_of(x, scale, bounds, zero_point, interval).to(torch.int8 if signed else torch.uint8)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Return s * (codes - z): a node of a converted graph.

    ``bits`` says how wide the codes are, for whoever packs them; ``dtype`` is the result's, by default the scale's.
    """
    sequence: Any = codes
    if isinstance(sequence, PackedSequence):
        data = dequantize(sequence.data, scale, zero_point, bits=bits, dtype=dtype)
        return cast(Tensor, sequence._replace(data=data))
    value = _value(codes.to(scale.dtype), scale, zero_point)
    return value if dtype is None else value.to(dtype)


# --- the discretizer -----------------------------------------------------------------------------------------


def nothing_if_nan(term: Tensor) -> Tensor:
    """A term of a gradient, or 0 where it is not a number: inf - inf of an element that was not replaced, 0 * inf."""
    return torch.where(term == term, term, 0.0)


def _forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    rate: Tensor | None,
    key: Tensor | None,
    channels_last: bool,
    q_min: int,
    q_max: int,
) -> Tensor:
    """y; with ``channels_last``, ``x`` is (batch, positions, channels) of a tensor (batch, channels, positions)."""
    wide = x.to(compute_dtype(x))
    step = scale.to(wide.dtype)
    y = _value(_unclamped(wide, step, zero_point).clamp(q_min, q_max), step, zero_point)
    # Where it has that dtype, ``to`` gives y a second name, and torch 2.11's compiler loses the gradients of the first.
    if y.dtype != x.dtype:
        y = y.to(x.dtype)
    if rate is None or key is None:
        return y
    index = _channels_last_index(x) if channels_last else _index_like(x)
    return torch.where(_is_replaced(index, key, rate), y, x)


def _is_kept(x: Tensor, y: Tensor, scale: Tensor, zero_point: Tensor | None, q_min: int, q_max: int) -> Tensor:
    """(r or not m): the elements that are in range, or were not replaced."""
    wide = compute_dtype(x)
    codes = _unclamped(x.to(wide), scale.to(wide), zero_point)
    return ((codes >= q_min) & (codes <= q_max)) | (x == y)


def _backward(
    estimator: "type[Estimator]",
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    strength: Tensor,
    q_min: int,
    q_max: int,
) -> tuple[Tensor, Tensor]:
    """dL/dx_c and dL/ds, the latter in the shape of ``scale``."""
    dtype, wide = x.dtype, compute_dtype(x)
    grad, x, y, step = grad.to(wide), x.to(wide), y.to(wide), scale.to(wide)
    keep = _is_kept(x, y, step, zero_point, q_min, q_max)
    span = step.abs() * (q_max - q_min)
    grad_x = estimator.gradient(grad, x, y, keep, span, strength.to(wide)).to(dtype)
    moved = nothing_if_nan(y - torch.where(keep, x, 0.0))
    slope = (grad * moved).sum_to_size(scale.shape)  # divided once, not for each element
    return grad_x, (slope / step).to(scale.dtype)


_FORWARD = LocalKernel(_forward)


class _View(NamedTuple):
    """A dense tensor as a kernel sees it: flat, one row per channel, or (batch, positions, channels)."""

    shape: tuple[int, ...]
    order: tuple[int, ...] | None  # permutation that makes the memory contiguous
    scale_shape: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:
        # ``data``: the compiler would guard on the base of a view, and compile anew for each.
        return (x if self.order is None else x.permute(self.order)).reshape(self.shape).data

    def of_scale(self, scale: Tensor) -> Tensor:
        return scale.reshape(self.scale_shape).data

    def back(self, y: Tensor, like: Tensor) -> Tensor:
        if self.order is None:
            return y.view(like.shape)
        shape = [like.shape[i] for i in self.order]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return y.view(shape).permute(inverse)


def _view_of(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> _View | None:
    """Return how a kernel may see ``x`` without a copy, or None."""
    if zero_point is not None and zero_point.numel() != scale.numel():
        return None
    if scale.numel() == 1:
        if x.is_contiguous():
            return _View((-1,), None, ())
        if x.ndim == 4 and min(x.shape) > 1 and x.is_contiguous(memory_format=torch.channels_last):
            return _View((x.shape[0], -1, x.shape[1]), (0, 2, 3, 1), ())
    elif x.is_contiguous() and scale.ndim == x.ndim and scale.numel() == scale.shape[0] == x.shape[0] < x.numel():
        return _View((x.shape[0], -1), None, (-1, 1))
    return None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """Return the kernels written by hand where Triton is installed, imported when first needed: that takes a while."""
    try:
        from pege_fx.kernels import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _by_hand(x: Tensor) -> ModuleType | None:
    """Return the kernels written by hand if they may compute on ``x``."""
    if not fits_a_kernel(x):
        return None
    return c_kernels if x.is_cpu else _triton_kernels() if x.is_cuda else None


def _quantized(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    rate: Tensor | None,
    key: Tensor | None,
    q_min: int,
    q_max: int,
) -> Tensor:
    """y, by a kernel where one fits, in the memory layout of ``x``."""
    by_hand = _by_hand(x)
    if by_hand is not None:
        y: Tensor | None = by_hand.forward(x, scale, zero_point, rate, key, q_min, q_max)
        if y is not None:
            return y
    view = _view_of(x, scale, zero_point) if worth_compiling(x) else None
    if view is None:
        return _forward(x, scale, zero_point, rate, key, False, q_min, q_max)
    zero = None if zero_point is None else view.of_scale(zero_point)
    channels_last = view.order is not None
    return view.back(_FORWARD(view.of(x), view.of_scale(scale), zero, rate, key, channels_last, q_min, q_max), x)


def can_be_made_again(y: Tensor) -> bool:
    """Tell whether a tensor comes right from a discretizer that did not keep it."""
    return type(y) is Tensor and y.numel() > 0 and not y.is_meta and getattr(y.grad_fn, "recompute", False)


def made_again(node: Any) -> Tensor:
    """Return y of a discretizer's autograd node that did not keep it; from the first call to its backward it keeps it."""
    if node.remembered is None:
        x, _, scale, zero_point, strength, rate, key = node.saved_tensors  # once: activation checkpoints give them once
        with torch.no_grad():
            y = _quantized(x, scale, zero_point, rate, key, *node.bounds)
        node.remembered = x, y, scale, zero_point, strength, rate, key
    return cast(Tensor, node.remembered[1])


def continuous_and_replaced(node: Any) -> tuple[Tensor, Tensor]:
    """Return x_c and y of a discretizer's autograd node, while it has them."""
    if node.recompute:
        made_again(node)
    x, y = (node.remembered or node.saved_tensors)[:2]
    return x, y


def parts_of_gradient(estimator: "type[Estimator]", node: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
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
    node.remembered = node.remembered or node.saved_tensors
    x, y, scale, zero_point, strength = node.remembered[:5]
    keep = _is_kept(x, y, scale, zero_point, *node.bounds)
    q_min, q_max = node.bounds
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    grad, x, y, scale, strength = (value.to(wide) for value in (grad, x, y, scale, strength))
    span = scale.abs() * (q_max - q_min)
    plain = estimator.gradient(grad, x, y, keep, span, torch.zeros_like(strength))
    return plain, estimator.gradient(grad, x, y, keep, span, strength) - plain


def _discretizer(estimator: "type[Estimator]") -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """The discretizer with the backward of ``estimator``: a class each, made once, so that compilers see through it.

    The second is the one for the transforms of ``torch.func``.
    """

    def backward_of(
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        strength: Tensor,
        q_min: int,
        q_max: int,
    ) -> tuple[Tensor, Tensor]:
        return _backward(estimator, grad, x, y, scale, zero_point, strength, q_min, q_max)

    backward_kernel = LocalKernel(backward_of)

    def gradients_of(
        grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, zero_point: Tensor | None, strength: Tensor, *bounds: int
    ) -> tuple[Tensor, Tensor]:
        """dL/dx_c and dL/ds, by a kernel where one fits."""
        if not (fits_a_kernel(x) and has_memory(grad)):  # of several gradients at once, autograd makes one by vmap
            return backward_of(grad, x, y, scale, zero_point, strength, *bounds)
        by_hand = _by_hand(x)
        if by_hand is not None and estimator in _NAMES_BY_HAND:
            name, size = _NAMES_BY_HAND[estimator], strength
            if estimator is SharePEGE:
                size = lambda_of_share(grad, x, y, _is_kept(x, y, scale, zero_point, *bounds), strength)
            made: tuple[Tensor, Tensor] | None = by_hand.backward(name, grad, x, y, scale, zero_point, size, *bounds)
            if made is not None:
                return made
        view = _view_of(x, scale, zero_point) if worth_compiling(x) else None
        if view is None:
            return backward_of(grad, x, y, scale, zero_point, strength, *bounds)
        zero = None if zero_point is None else view.of_scale(zero_point)
        flat, sums = backward_kernel(view.of(grad), view.of(x), view.of(y), view.of_scale(scale), zero, strength, *bounds)
        return view.back(flat, x), sums.view(scale.shape)

    class FakeQuantize(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            scale: Tensor,
            zero_point: Tensor | None,
            rate: Tensor | None,
            key: Tensor | None,
            strength: Tensor,
            q_min: int,
            q_max: int,
            scale_gradient: float,
            recompute: bool,
        ) -> Tensor:
            y = _quantized(x, scale, zero_point, rate, key, q_min, q_max)
            kept = (None, scale, zero_point, strength, rate, key) if recompute else (y, scale, zero_point, strength, None, None)
            ctx.save_for_backward(x, *kept)
            ctx.bounds, ctx.scale_gradient, ctx.recompute, ctx.remembered = (q_min, q_max), scale_gradient, recompute, None
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            if ctx.recompute:
                made_again(ctx)
            x, y, scale, zero_point, strength, rate, key = ctx.remembered or ctx.saved_tensors
            if ctx.recompute:
                ctx.remembered = None
                if torch.is_grad_enabled():  # for a second derivative y is a function of x, which adds no lambda again
                    nothing = torch.zeros_like(strength)
                    y = FakeQuantize.apply(x, scale, zero_point, rate, key, nothing, *ctx.bounds, ctx.scale_gradient, False)
            grad_x, grad_scale = gradients_of(grad, x, y, scale, zero_point, strength, *ctx.bounds)
            wanted = ctx.needs_input_grad
            scaled = grad_scale * ctx.scale_gradient if wanted[1] else None
            return grad_x if wanted[0] else None, scaled, *(None,) * 8

    FakeQuantize.__name__ = FakeQuantize.__qualname__ = f"FakeQuantize{estimator.__name__}"
    kept = _is_kept if estimator.has_tangent else None
    return FakeQuantize, transformed(estimator.__name__, _quantized, gradients_of, kept)


# --- estimators ----------------------------------------------------------------------------------------------


class Estimator(ABC):
    """How a gradient passes the discretizer. A subclass names itself and is then known to every policy:

    >>> class Halved(Estimator, name="halved-example"):
    ...     @staticmethod
    ...     def gradient(grad, x, y, keep, span, strength):
    ...         return 0.5 * grad * keep

    ``strength`` says what the last argument of ``gradient`` is: "lambda", the scheduler's λ for weights or for
    activations; or a number, the first value of a 0-d buffer ``strength`` that each site has to itself. ``is_relative``: it
    multiplies a gradient, so that it stays what it is where the loss is scaled. ``has_tangent``: what reaches x_c is r * g and
    terms of the loss's, so that forward mode (``torch.func.jvp``) has r * dx_c.
    """

    strength: ClassVar[float | Literal["lambda"]] = "lambda"
    is_relative: ClassVar[bool] = False
    has_tangent: ClassVar[bool] = False
    discretizer: ClassVar[type[torch.autograd.Function]]
    transformed: ClassVar[type[torch.autograd.Function]]

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.discretizer, cls.transformed = _discretizer(cls)
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


class STE(Estimator, name="ste"):
    """The straight-through estimator: r * g."""

    has_tangent = True

    @staticmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        return torch.where(keep, grad, 0.0)


class EWGS(Estimator, name="ewgs"):
    """Element-wise gradient scaling (Lee et al., CVPR 2021): r * g * (1 + delta * sign(g) * (x_c - x_q) / span).

    ``delta`` is the buffer ``strength`` of each site; the paper sets it from the trace of the Hessian.
    """

    strength = 1e-3

    @staticmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        scaled = grad + nothing_if_nan(strength * grad.abs() * ((x - y) / span))
        return torch.where(keep, scaled, 0.0)


class PEGE(Estimator, name="pege"):
    """Progressive element-wise gradient estimation: (r or not m) * g + lambda * (x_c - y), lambda in absolute units."""

    has_tangent = True

    @staticmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        return torch.where(keep, grad, 0.0) + nothing_if_nan(strength * (x - y))


class RelativePEGE(Estimator, name="pege-relative"):
    """PEGE with lambda in units of the site's mean |g|, so that one value serves sites whose gradients differ in size."""

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

    is_relative = True
    has_tangent = True

    @staticmethod
    def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
        return torch.where(keep, grad, 0.0) + nothing_if_nan(lambda_of_share(grad, x, y, keep, strength) * (x - y))


_NAMES_BY_HAND: dict[type[Estimator], str] = {STE: "ste", EWGS: "ewgs", PEGE: "pege", RelativePEGE: "pege-relative"}
_NAMES_BY_HAND[SharePEGE] = "pege"  # once its λ is known


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    *,
    zero_point: Tensor | None = None,
    rate: Tensor | None = None,
    key: Tensor | None = None,
    strength: Tensor | None = None,
    scale_gradient: float = 1.0,
    recompute: bool = False,
) -> Tensor:
    """Replace elements of ``x`` by their quantized values; forward and backward as in the module's docstring.

    Args:
        x: x_c, floating point, any shape.
        scale: s, broadcastable to ``x``; gets a gradient. s < 0 gives the grid of |s| mirrored.
        spec: bounds and estimator.
        zero_point: z, broadcastable to ``x``; None is 0.
        rate: p, 0-d; None replaces every element (p = 1).
        key: int32 key of the masks, see ``uniform``; needed with ``rate``.
        strength: λ for PEGE, δ for EWGS, 0-d; None is 0.
        scale_gradient: factor of the scale's gradient, LSQ's 1 / sqrt(N * q_max).
        recompute: keep x_c alone for backward, and make y again there.

    Returns:
        y, of the shape and dtype of ``x``.

    Raises:
        SpecError: if ``x`` is not floating point, or ``rate`` comes without ``key``.

    >>> x = torch.tensor([-3.0, 0.2, 0.6, 9.0])
    >>> fake_quantize(x, torch.tensor(1.0), QuantSpec(bits=2))
    tensor([-2.,  0.,  1.,  1.])
    """
    if not x.is_floating_point():
        raise SpecError(f"can not quantize a {x.dtype} tensor: give a floating-point one.")
    if rate is not None and key is None:
        raise SpecError("rate needs key: give both for masks, or neither to replace every element.")
    if strength is None:
        strength = scale.new_zeros(())
    estimator = ESTIMATORS[str(spec.estimator)]
    args = (x, scale, zero_point, rate, key, strength, *spec.bounds, scale_gradient)
    result: Tensor
    try:
        result = estimator.discretizer.apply(*args, recompute)
    except RuntimeError as error:  # torch has no public question for this, but tells
        if not any(missing in str(error) for missing in ("setup_context", "jvp")):
            raise
        result = estimator.transformed.apply(*args)
    return result


def discretization_error(x: Tensor, y: Tensor) -> Tensor:
    """Return ||x_c - y||^2 as a 0-d tensor, differentiable in ``x`` with ``y`` held constant.

    An element that was not replaced adds nothing, also where it is infinite or NaN.
    """
    wide = compute_dtype(x)
    return nothing_if_nan(x.to(wide) - y.detach().to(wide)).square().sum()
