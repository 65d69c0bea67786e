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

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pege_fx.errors import SpecError
from pege_fx.numerics.discretizer import divided, unclamped, value_of
from pege_fx.numerics.estimators import EWGS, PEGE, STE, Estimator, RelativePEGE, SharePEGE, nothing_if_nan
from pege_fx.numerics.formats import Format, Integer, compute_dtype, format_of
from pege_fx.numerics.layouts import Channels, Tiling, layout_named
from pege_fx.numerics.masks import (
    as_int32,
    mix32,
    refresh_key,
    replacement_mask,
    row_major_index,
    site_key,
    uniform,
)
from pege_fx.numerics.spec import METHODS, QuantSpec

__all__ = [
    "EWGS",
    "PEGE",
    "STE",
    "Estimator",
    "RelativePEGE",
    "SharePEGE",
    "as_int32",
    "codes_of",
    "compute_dtype",
    "dequantize",
    "discretization_error",
    "fake_quantize",
    "mix32",
    "nothing_if_nan",
    "quantize",
    "refresh_key",
    "replacement_mask",
    "row_major_index",
    "site_key",
    "uniform",
]

# --- codes ---------------------------------------------------------------------------------------------------


class QParams(NamedTuple):
    """The grid of each tile: ``x_q = (level - zero_point) * scale``.

    ``inverse``, where a definition has one, is what x is multiplied by instead of being divided by the scale.

    >>> QParams(torch.tensor(0.5)).zero_point is None
    True
    """

    scale: Tensor
    zero_point: Tensor | None = None
    inverse: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "QParams":
        """Return what a function makes of each part that is there."""
        scale, *others = (value if value is None else function(value) for value in self)
        return QParams(cast(Tensor, scale), *others)


def codes_of(
    x: Tensor,
    scale: Tensor,
    number_format: Format,
    zero_point: Tensor | None = None,
    interval: tuple[Tensor, Tensor] | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """Return the level of each element in units of the scale, still as floating point; of whole numbers that is the code.

    Args:
        x: any shape; half types are computed in float32.
        scale, zero_point, inverse: broadcast to ``x``; a zero point moves whole numbers alone.
        number_format: whose levels.
        interval: (lower, width); ``x`` becomes (x - lower) / width first, as the learned interval does.
    """
    x = x.to(compute_dtype(x))
    if interval is not None:
        x = (x - interval[0]) / interval[1]
    scale = scale.to(x.dtype)
    if zero_point is None:
        return number_format.round(divided(x, scale, inverse))
    return unclamped(x, scale, zero_point, inverse).clamp(*number_format.limits)


def dynamic_qparams(
    x: Tensor,
    *,
    method: str,
    bits: int,
    signed: bool = True,
    narrow: bool = False,
    format: str | None = None,
    layout: str = "tensor",
    scale: str = "float32",
) -> QParams:
    """Return the grid that a dynamic forward method finds for a tensor: a node of a converted graph.

    Args:
        x: any shape.
        method: registered name of a dynamic method.
        bits, signed, narrow, format: the number format, see ``quantize``.
        layout: which elements share a scale, see ``quantize``.
        scale: how scales are stored.

    Returns:
        Scales, and zero points and inverses where the method has them, one for each tile, in the layout's own shape.
    """
    tiling = _tiling(x, layout, None)
    found = METHODS[method].choose(tiling.rows(x.detach()), _format(bits, signed, narrow, format), scale)
    shape = tiling.layout.scale_shape(tuple(x.shape), tiling.channels)
    return cast(QParams, found.map(lambda value: value.reshape(shape)))


def _format(bits: int, signed: bool, narrow: bool, name: str | None) -> Format:
    return Integer(bits, signed, narrow) if name is None else format_of(name)


def _tiling(x: Tensor, layout: str, axis: int | None) -> Tiling:
    """How a tensor of a converted graph is seen; ``axis``: of a weight's output channels."""
    if axis is None:
        return Tiling(layout_named(layout), "activation")
    return Tiling(layout_named(layout), "weight", tuple(x.shape), Channels(x.shape[axis], axis))


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    lower: Tensor | None = None,
    width: Tensor | None = None,
    inverse: Tensor | None = None,
    *,
    bits: int,
    signed: bool,
    narrow: bool = False,
    format: str | None = None,
    layout: str | None = None,
    axis: int | None = None,
) -> Tensor:
    """Return the codes of ``x``: a node of a converted graph.

    Args:
        x: floating point.
        scale, zero_point, inverse: broadcast to ``x``, or with a ``layout`` one for each of its tiles.
        lower, width: see ``codes_of``.
        bits, signed, narrow: of whole numbers; codes are int8 (signed) or uint8.
        format: the name of another format, whose codes are uint8.
        layout: the name of a scale layout.
        axis: of a weight's output channels; None for an activation.
    """
    sequence: Any = x
    settings: dict[str, Any] = {"bits": bits, "signed": signed, "narrow": narrow, "format": format}
    if isinstance(sequence, PackedSequence):  # what goes into a recurrent layer comes out as it is
        more = {**settings, "layout": layout, "axis": axis}
        return cast(Tensor, sequence._replace(data=quantize(sequence.data, scale, zero_point, lower, width, inverse, **more)))
    number_format = _format(bits, signed, narrow, format)
    interval = None if lower is None or width is None else (lower, width)
    if layout is None:
        return number_format.encode(codes_of(x, scale, number_format, zero_point, interval, inverse))
    tiling = _tiling(x, layout, axis)
    scale, zero_point, inverse = _laid_out(tiling, scale, zero_point, inverse)
    levels = codes_of(tiling.tiles(x), scale, number_format, zero_point, interval, inverse)
    return tiling.untiled(number_format.encode(levels), x)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int,
    dtype: torch.dtype | None = None,
    format: str | None = None,
    layout: str | None = None,
    axis: int | None = None,
) -> Tensor:
    """Return s * (level - z): a node of a converted graph.

    ``bits`` says how wide the codes are, for whoever packs them; ``dtype`` is the result's, by default the scale's; ``format``,
    ``layout`` and ``axis`` as for ``quantize``.
    """
    sequence: Any = codes
    if isinstance(sequence, PackedSequence):
        settings: dict[str, Any] = {"dtype": dtype, "format": format, "layout": layout, "axis": axis}
        return cast(Tensor, sequence._replace(data=dequantize(sequence.data, scale, zero_point, bits=bits, **settings)))
    levels = codes.to(scale.dtype) if format is None else format_of(format).decode(codes, scale.dtype)
    if layout is None:
        value = value_of(levels, scale, zero_point)
    else:
        tiling = _tiling(codes, layout, axis)
        scale, zero_point, _ = _laid_out(tiling, scale, zero_point, None)
        value = tiling.untiled(value_of(tiling.tiles(levels), scale, zero_point), levels)
    return value if dtype is None else value.to(dtype)


def _laid_out(tiling: Tiling, scale: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    zero_point, inverse = (None if value is None else tiling.broadcast(value) for value in others)
    return tiling.broadcast(scale), zero_point, inverse


# --- training ---------------------------------------------------------------------------------------------------


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    *,
    zero_point: Tensor | None = None,
    inverse: Tensor | None = None,
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
        spec: format and estimator.
        zero_point: z, broadcastable to ``x``; None is 0, and what every format but whole numbers has.
        inverse: what ``x`` is multiplied by instead of being divided by the scale, broadcastable to ``x``.
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
    args = (x, scale, zero_point, inverse, rate, key, strength, spec.grid.q_min, spec.grid.q_max, scale_gradient)
    result: Tensor
    try:
        result = spec.discretizers.ordinary.apply(*args, recompute)
    except RuntimeError as error:  # torch has no public question for this, but tells
        if not any(missing in str(error) for missing in ("setup_context", "jvp")):
            raise
        result = spec.discretizers.transformed.apply(*args)
    return result


def discretization_error(x: Tensor, y: Tensor) -> Tensor:
    """Return ||x_c - y||^2 as a 0-d tensor, differentiable in ``x`` with ``y`` held constant.

    An element that was not replaced adds nothing, also where it is infinite or NaN.
    """
    wide = compute_dtype(x)
    return nothing_if_nan(x.to(wide) - y.detach().to(wide)).square().sum()
