"""BatchNorm that is live in training and already folded in evaluation.

With k = gamma / sqrt(var + eps) from the running statistics, a layer with weight w and bias b followed by BatchNorm is

    w' = k * w        b' = k * (b - mean) + beta

In training the graph computes layer, then BatchNorm with batch statistics. In evaluation it computes the layer with w'
and b', and the BatchNorm hands its input on: the very operations that ``convert`` keeps, so that both agree bit for bit.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pege_fx.functional import compute_dtype
from pege_fx.spec import Channels

# A gamma of zero (the usual start of a residual branch) must not make a scale of zero.
_SMALLEST_FACTOR = 2.0**-60

BatchNorm: TypeAlias = nn.modules.batchnorm._BatchNorm


class _Folded:
    """Identity in evaluation, where the layer before has taken the normalisation over."""

    training: bool

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) if self.training else x  # type: ignore[misc]
        return result


class FoldedBatchNorm1d(_Folded, nn.BatchNorm1d):
    """``BatchNorm1d`` in training, identity in evaluation."""


class FoldedBatchNorm2d(_Folded, nn.BatchNorm2d):
    """``BatchNorm2d`` in training, identity in evaluation."""


class FoldedBatchNorm3d(_Folded, nn.BatchNorm3d):
    """``BatchNorm3d`` in training, identity in evaluation."""


class FoldedSyncBatchNorm(_Folded, nn.SyncBatchNorm):
    """``SyncBatchNorm`` in training, identity in evaluation."""


class _NormThen:
    """A BatchNorm whose children follow it, in their order: a normalisation layer with its activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        for child in self.children():  # type: ignore[attr-defined]
            x = child(x)
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """The BatchNorm alone."""
        result: Tensor = super().forward(x)  # type: ignore[misc]
        return result


class NormThen1d(_NormThen, nn.BatchNorm1d):
    """``BatchNorm1d``, then its children."""


class NormThen2d(_NormThen, nn.BatchNorm2d):
    """``BatchNorm2d``, then its children."""


class NormThen3d(_NormThen, nn.BatchNorm3d):
    """``BatchNorm3d``, then its children."""


def only_normalizes(module: nn.Module) -> None:
    """Let a normalisation whose children have become nodes of their own be the BatchNorm alone, in place."""
    for base, cls in NORM_THEN.items():
        if type(module) is cls:
            module.__class__ = base


NORM_THEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: NormThen1d,
    nn.BatchNorm2d: NormThen2d,
    nn.BatchNorm3d: NormThen3d,
}
FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FoldedBatchNorm1d,
    nn.BatchNorm2d: FoldedBatchNorm2d,
    nn.BatchNorm3d: FoldedBatchNorm3d,
    nn.SyncBatchNorm: FoldedSyncBatchNorm,
}


class Fold:
    """The BatchNorm that a layer's weight and bias take over. Refers to it without owning it, so no key is doubled."""

    def __init__(self, bn: Any, channels: Channels) -> None:
        self.bn = bn
        self.channels = channels

    @property
    def live(self) -> bool:
        """The BatchNorm normalises with batch statistics: nothing is folded at the moment."""
        return bool(self.bn.training)

    def factor(self) -> Tensor:
        """k = gamma / sqrt(var + eps), one per output channel, in float32 at least, never zero."""
        variance = self.bn.running_var
        factor: Tensor = (variance.to(compute_dtype(variance)) + self.bn.eps).rsqrt()
        if self.bn.weight is not None:
            factor = self.bn.weight.to(factor.dtype) * factor
        tiny = torch.full_like(factor, _SMALLEST_FACTOR)
        return torch.where(factor.abs() < tiny, torch.copysign(tiny, factor), factor)

    def sign(self) -> Tensor:
        """+1 or -1 per output channel: the sign of k."""
        if self.bn.weight is None:
            return torch.ones_like(self.bn.running_var)
        return torch.copysign(torch.ones_like(self.bn.weight), self.bn.weight).detach()

    def broadcast(self, values: Tensor, weight: Tensor) -> Tensor:
        return self.channels.broadcast(values, tuple(weight.shape))

    def weight(self, weight: Tensor) -> Tensor:
        """w' = k * w."""
        return (weight * self.broadcast(self.factor(), weight)).to(weight.dtype)

    def bias(self, bias: Tensor | None) -> Tensor:
        """b' = k * (b - mean) + beta, in the dtype of the BatchNorm's running mean."""
        mean = self.bn.running_mean
        shifted = -mean if bias is None else bias - mean
        folded = self.factor() * shifted
        if self.bn.bias is not None:
            folded = folded + self.bn.bias
        result: Tensor = folded.to(mean.dtype)
        return result


class WeightFold(nn.Module):
    """A float weight on its way to a layer with a folded BatchNorm: w in training, k * w in evaluation."""

    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.fold = fold

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.fold.live else self.fold.weight(weight)


class BiasFold(nn.Module):
    """The bias (or None) of a layer with a folded BatchNorm: b in training, k * (b - mean) + beta in evaluation."""

    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.fold = fold

    def forward(self, bias: Tensor | None) -> Tensor | None:
        return bias if self.fold.live else self.fold.bias(bias)
