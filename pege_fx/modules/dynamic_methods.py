"""Forward methods whose scale is that of the tensor at hand, computed in each forward: nothing is learned, nothing kept.

No gradient goes through the scale: it is a constant of its tile. A tile with NaN or an infinity comes out as NaN; in one of
zeros alone every value is zero.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from pege_fx.errors import SpecError
from pege_fx.modules.forward_method import ForwardMethod, Statistics
from pege_fx.numerics.formats import E4M3, Float, Format
from pege_fx.numerics.functional import QParams, compute_dtype
from pege_fx.numerics.layouts import Kind, PerGroup
from pege_fx.numerics.spec import QuantSpec

SMALLEST = torch.finfo(torch.float32).eps  # of a scale, as in torchao: what is smaller than that all over is rounded to zero


class DynamicMethod(ForwardMethod):
    """A scale from the tensor itself. A subclass says how, for tiles given as rows.

    Args:
        spec, kind, shape, channels: see ``ForwardMethod``.

    >>> class Largest(DynamicMethod, name="largest-example"):
    ...     @staticmethod
    ...     def choose(rows, number_format, scale_dtype):
    ...         return QParams(rows.abs().amax(1).clamp(min=1e-6) / number_format.limits[1])
    """

    is_dynamic = True

    @staticmethod
    @abstractmethod
    def choose(rows: Tensor, number_format: Format, scale_dtype: str) -> QParams:
        """Return the grid of each row, shape (rows,): scale, zero point and inverse or None.

        Args:
            rows: shape (scales, elements of a tile), without gradient.
            number_format: of the codes.
            scale_dtype: how scales are stored.
        """

    @classmethod
    def default_granularity(cls, kind: Kind) -> str:
        return "channel" if kind == "weight" else "token"

    def initialize(self, statistics: Statistics) -> None:
        """Nothing to find: every tensor brings its scale."""

    def qparams(self, x: Tensor) -> QParams:
        with torch.no_grad():
            found = self.choose(self.tiling.rows(x.detach()), self.spec.number_format, self.spec.scale)
        return found.map(self.broadcast)


def _stored(scale: Tensor, scale_dtype: str) -> Tensor:
    """A scale as it is stored, in float32."""
    return (scale.to(torch.bfloat16) if scale_dtype == "bfloat16" else scale).to(torch.float32)


class MinMax(DynamicMethod, name="dynamic"):
    """The range of each tile, symmetric: scale = max|x| over half the width of the format, as in torchao.

    That is 7.5 for 4 bits, signed; the largest level for unsigned whole numbers, and for formats that are symmetric anyway.
    """

    @staticmethod
    def choose(rows: Tensor, number_format: Format, scale_dtype: str) -> QParams:
        low, high = number_format.limits
        scale = _largest(rows) / (high if low >= 0 else (high - low) / 2)
        scale = _stored(scale.clamp(min=SMALLEST), scale_dtype)
        return QParams(scale, None, scale.reciprocal())


class AsymmetricMinMax(DynamicMethod, name="dynamic-asymmetric"):
    """The range of each tile, zero included, with a whole zero point: torchao's per-token activations in 8da4w."""

    takes_every_format = False

    @classmethod
    def signed_by_default(cls, kind: Kind, non_negative: bool) -> bool:
        return kind == "activation"

    @staticmethod
    def choose(rows: Tensor, number_format: Format, scale_dtype: str) -> QParams:
        q_min, q_max = number_format.limits
        low, high = (rows.new_zeros(rows.shape[0]),) * 2
        if rows.numel():
            low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        scale = ((high - low) / (q_max - q_min)).clamp(min=SMALLEST)
        zero_point = (q_min - torch.round(low / scale)).clamp(q_min, q_max).to(torch.float32)
        scale = _stored(scale, scale_dtype)
        return QParams(scale, zero_point, scale.reciprocal())


class AbsMean(DynamicMethod, name="absmean"):
    """scale = E|x|, per tensor where nothing else is asked for: ternary weights of BitNet b1.58, binary ones of XNOR-Net."""

    @classmethod
    def default_granularity(cls, kind: Kind) -> str:
        return "tensor"

    @staticmethod
    def choose(rows: Tensor, number_format: Format, scale_dtype: str) -> QParams:
        mean = rows.abs().mean(1, dtype=compute_dtype(rows)) if rows.numel() else rows.new_zeros(rows.shape[0])
        return QParams(_stored(mean.clamp(min=SMALLEST), scale_dtype))


class TernaryWeights(DynamicMethod, name="twn"):
    """Ternary Weight Networks (Li et al., 2016): zero below 0.7 E|w|, the mean of what lies beyond as the scale."""

    @classmethod
    def check_spec(cls, spec: QuantSpec) -> None:
        super().check_spec(spec)
        if not (spec.format is None and spec.bits == 2 and spec.narrow):
            raise SpecError('method="twn" is for ternary codes: give format="ternary".')

    @staticmethod
    def choose(rows: Tensor, number_format: Format, scale_dtype: str) -> QParams:
        size = rows.to(compute_dtype(rows)).abs()
        threshold = (0.7 * size.mean(1)).clamp(min=SMALLEST)
        beyond = size > threshold[:, None]
        scale = torch.where(beyond, size, 0.0).sum(1) / beyond.sum(1).clamp(min=1)
        return QParams(_stored(scale.clamp(min=SMALLEST), scale_dtype), None, 0.5 / threshold)  # half of 1 / (2 * threshold)


class MX(DynamicMethod, name="mx"):
    """OCP Microscaling 1.0: scale = 2 ** (floor(log2 max|x|) - the exponent of the format's largest power of two), in E8M0."""

    scale_dtypes = ("e8m0",)

    @classmethod
    def check_spec(cls, spec: QuantSpec) -> None:
        super().check_spec(spec)
        _check_blocks(spec, "mx", Float, 'a float format, as in "mxfp4"')

    @classmethod
    def default_granularity(cls, kind: Kind) -> str:
        return "group-32"

    @staticmethod
    def choose(rows: Tensor, number_format: Format, scale_dtype: str) -> QParams:
        largest = _largest(rows).to(torch.float32)
        top = math.frexp(number_format.limits[1])[1] - 1  # of the format's largest power of two
        # By the bits of float32: exact, and defined for infinities, too.
        biased = ((largest.view(torch.int32) >> 23 & 0xFF) - top).clamp(0, 254)
        power = (biased << 23).view(torch.float32)
        scale = torch.where(biased == 0, 2.0**-127, power)
        # As in torchao, what is scaled by the smallest number of E8M0 is divided by the smallest normal one.
        return QParams(torch.where(largest == largest, scale, torch.nan), None, power.clamp(min=2.0**-126).reciprocal())


class NVFP4(DynamicMethod, name="nvfp4"):
    """NVIDIA's FP4: a scale max|x| / 6 for each 16 elements, in E4M3, over one of the tensor, max|x| / (448 * 6), in float32.

    Multiplies by 1 / tensor scale / block scale, as torchao's ``NVFP4Tensor`` does.
    """

    scale_dtypes = ("e4m3",)

    @classmethod
    def check_spec(cls, spec: QuantSpec) -> None:
        super().check_spec(spec)
        _check_blocks(spec, "nvfp4", Float, 'format="e2m1", as in "nvfp4"')

    @classmethod
    def default_granularity(cls, kind: Kind) -> str:
        return "group-16"

    @staticmethod
    def parts(rows: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
        """Return the scales of the rows, numbers of E4M3, and that of the tensor, 0-d."""
        largest, top = _largest(rows).to(torch.float32), number_format.limits[1]
        of_tensor = largest.amax() / (E4M3.highest * top) if rows.numel() else largest.new_ones(())
        of_tensor = torch.where(of_tensor > 0, of_tensor, torch.where(of_tensor == 0, 1.0, of_tensor))  # NaN stays
        return E4M3.round((largest / top / of_tensor).clamp(2.0**-6, E4M3.highest)), of_tensor

    @staticmethod
    def choose(rows: Tensor, number_format: Format, scale_dtype: str) -> QParams:
        of_row, of_tensor = NVFP4.parts(rows, number_format)
        return QParams(of_tensor * of_row, None, of_tensor.reciprocal() / of_row)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1) if rows.numel() else rows.new_zeros(rows.shape[0])


def _check_blocks(spec: QuantSpec, method: str, kind: type[Format], wanted: str) -> None:
    if not isinstance(spec.number_format, kind):
        raise SpecError(f'method="{method}" is for {wanted}, not for {spec.number_format}.')
    if spec.granularity is not None and not isinstance(spec.layout, PerGroup):
        raise SpecError(f'method="{method}" has a scale for each group, not for each {spec.granularity}: give "group-32".')
