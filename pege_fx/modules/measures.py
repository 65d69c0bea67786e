"""What quantization does to the values of a site: its relative error, and which values are clipped. Defined here alone.

The relative error is ``||x - x_q||^2 / ||x||^2``. A value is clipped if it lies beyond the ends of the grid by more than half a
step, where it enters: before any clip of the forward method's own. What a method bends (tanh) is not clipped by that.
"""

import torch
from torch import Tensor

from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.modules.forward_method import ForwardMethod
from pege_fx.numerics.discretizer import divided, value_of
from pege_fx.numerics.formats import compute_dtype
from pege_fx.numerics.functional import codes_of


def squares(fq: FakeQuant, x: Tensor) -> Tensor:
    """Return ``||x - x_q||^2`` and ``||x||^2``, fully quantized, in float32 at least: those of several batches add up.

    Args:
        fq: a calibrated site.
        x: as the forward method sees it, see ``FakeQuant.enter``.
    """
    wide, method = x.to(compute_dtype(x)), fq.method
    continuous, tiling = method.transform(x), method.tiling
    scale, zero_point, inverse = method.grid_of(continuous)
    levels = codes_of(tiling.tiles(continuous), scale, fq.site.spec.number_format, zero_point, inverse=inverse)
    x_q = method.restore(tiling.untiled(value_of(levels, scale, zero_point), continuous))
    return torch.stack([(wide - x_q.to(wide.dtype)).square().sum(), wide.square().sum()])


def distance(fq: FakeQuant, x: Tensor) -> Tensor:
    """Return the sum of the distances to the nearest code, in steps of the grid: at most half a step where it is not clipped.

    Args:
        fq: a calibrated site.
        x: as the forward method sees it, see ``FakeQuant.enter``.
    """
    continuous, tiling = fq.method.transform(x), fq.method.tiling
    scale, zero_point, inverse = fq.method.grid_of(continuous)
    place, shift = divided(tiling.tiles(continuous), scale, inverse), 0.0 if zero_point is None else zero_point
    number_format = fq.site.spec.number_format
    return (place + shift - number_format.round(place + shift)).abs().sum()


def relative_error(of_squares: Tensor) -> Tensor:
    """Return the relative error from the (added) ``squares``; 0 where there is neither a value nor an error."""
    error, norm = of_squares
    return torch.div(error, norm.clamp(min=torch.finfo(norm.dtype).tiny))


def is_clipped(fq: FakeQuant, x: Tensor) -> Tensor:
    """Return which values lie beyond the grid of a site, bool, of the shape of ``x``.

    Args:
        fq: a calibrated site.
        x: as the forward method sees it, see ``FakeQuant.enter``.
    """
    method, tiling = fq.method, fq.method.tiling
    scale, zero_point, inverse = method.grid_of(method.transform(x))
    if type(method).transform is ForwardMethod.transform:
        place = divided(tiling.tiles(x), scale, inverse)
    elif type(method).encoding is ForwardMethod.encoding or (fq.site.kind == "weight" and _bends(method)):
        place = divided(tiling.tiles(method.transform(x)), scale, inverse)
    else:
        encoding = method.encoding()
        inside = x if encoding.lower is None or encoding.width is None else (x - encoding.lower) / encoding.width
        place, zero_point = tiling.tiles(inside) / encoding.scale, encoding.zero_point
    lowest, highest = fq.site.spec.number_format.reach
    codes = place if zero_point is None else place + zero_point
    return tiling.untiled((codes < lowest) | (codes > highest), x)


def _bends(method: ForwardMethod) -> bool:
    """A weight's method that maps back without an interval: where its grid ends, no clip says."""
    return type(method).restore is not ForwardMethod.restore and method.encoding().lower is None


def clipped_share(fq: FakeQuant, x: Tensor) -> float:
    """Return which part of what a site is given is clipped, 0 to 1."""
    with torch.no_grad():
        return float(is_clipped(fq, fq.enter(x)).float().mean())
