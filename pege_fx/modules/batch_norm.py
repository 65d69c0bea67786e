"""BatchNorm that is live in training and already folded in evaluation.

With k = gamma / sqrt(var + eps) from the running statistics, a layer with weight w and bias b followed by BatchNorm is

    w' = k * w        b' = k * (b - mean) + beta

In training the graph computes layer, then BatchNorm with batch statistics. In evaluation it computes the layer with w'
and b', and the BatchNorm hands its input on: the very operations that ``convert`` keeps, so that both agree bit for bit.

A BatchNorm in front of a layer is w' = w * k by its input channels, and b' = b + w (beta - k * mean).
"""

from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pege_fx.errors import FoldError
from pege_fx.kernels.inductor import is_traced
from pege_fx.numerics.functional import compute_dtype
from pege_fx.numerics.spec import Channels

# A gamma of zero (the usual start of a residual branch) must not make a scale of zero.
_SMALLEST_FACTOR = 2.0**-60

BatchNorm: TypeAlias = nn.modules.batchnorm._BatchNorm


class Folded:
    """Identity where the layer beside it has taken the normalisation over: in evaluation."""

    fold: "Fold"

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) if self.fold.live else x  # type: ignore[misc]
        return result


class FoldedBatchNorm1d(Folded, nn.BatchNorm1d):
    """``BatchNorm1d`` in training, identity in evaluation."""


class FoldedBatchNorm2d(Folded, nn.BatchNorm2d):
    """``BatchNorm2d`` in training, identity in evaluation."""


class FoldedBatchNorm3d(Folded, nn.BatchNorm3d):
    """``BatchNorm3d`` in training, identity in evaluation."""


class FoldedSyncBatchNorm(Folded, nn.SyncBatchNorm):
    """``SyncBatchNorm`` in training, identity in evaluation."""


class FunctionalBatchNorm(nn.Module):
    """``F.batch_norm`` as a module, on tensors that it refers to and others own; with ``frozen`` it never trains.

    Args:
        tensors: running mean, running variance, weight and bias, the latter two or None.
        momentum, eps, frozen: as there; frozen is ``training=False``.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], momentum: float, eps: float, *, frozen: bool) -> None:
        super().__init__()
        self.momentum, self.eps, self.frozen = momentum, eps, frozen
        self.tensors = tensors  # in a tuple, so that no key is doubled
        self.train()

    running_mean = property(lambda self: self.tensors[0])
    running_var = property(lambda self: self.tensors[1])
    weight = property(lambda self: self.tensors[2])
    bias = property(lambda self: self.tensors[3])

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, without the graph of what ``torch.func.functional_call`` may have put in the tensors' place."""
        tensors = tuple(value if value is None or value.is_leaf else value.detach() for value in self.tensors)
        return {**vars(self), "tensors": tensors}

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, weight, bias = self.tensors
        return F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)


class FoldedFunction(Folded, FunctionalBatchNorm):
    """``F.batch_norm`` in training, identity in evaluation."""


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
    FunctionalBatchNorm: FoldedFunction,
}


class Fold:
    """The BatchNorm that a layer's weight and bias take over. Refers to it without owning it, so no key is doubled.

    Args:
        bn: the BatchNorm; it becomes the identity in evaluation, in place.
        channels: where the weight keeps the channels that it normalises.
        between: dropouts between the two.
    """

    def __init__(self, bn: Any, channels: Channels, between: tuple[nn.Module, ...] = ()) -> None:
        self.channels, self.between = channels, between
        self._take(bn)

    def follow(self, *norm: Any) -> None:
        """Take over what the graph reads now: ``convert_sync_batchnorm`` puts other modules in, ``to()`` other tensors.

        Raises:
            FoldError: if it is no BatchNorm any more, or is another one for the first time while the model is being compiled.
        """
        if isinstance(self.bn, FoldedFunction):
            self.bn.tensors = norm
        elif norm[0] is not self.bn:
            self._take(*norm)

    def _take(self, bn: Any) -> None:
        if not isinstance(bn, Folded):
            if type(bn) not in FOLDED:
                raise FoldError(
                    f"a BatchNorm that is folded into the layer beside it has become {type(bn).__name__}.\n"
                    '  prepare with batch_norm="keep", or put it there before prepare.'
                )
            if is_traced():
                raise FoldError(
                    "BatchNorms were replaced since prepare: run the model once before torch.compile(fullgraph=True)."
                )
            bn.__class__ = FOLDED[type(bn)]
        self.bn, bn.fold = bn, self

    @property
    def live(self) -> bool:
        """The BatchNorm normalises with batch statistics, or a dropout is active: nothing is folded at the moment."""
        return any(module.training for module in (self.bn, *self.between))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that the factor is computed from."""
        return self.bn.weight, self.bn.running_var

    def factor(self) -> Tensor:
        """k = gamma / sqrt(var + eps), one per channel, in float32 at least, never zero; where gamma is, it still learns."""
        variance = self.bn.running_var
        factor: Tensor = (variance.to(compute_dtype(variance)) + self.bn.eps).rsqrt()
        if self.bn.weight is not None:
            factor = self.bn.weight.to(factor.dtype) * factor
        tiny = torch.full_like(factor, _SMALLEST_FACTOR)
        nonzero = torch.copysign(tiny, factor).detach() + (factor - factor.detach())
        return torch.where(factor.abs() < tiny, nonzero, factor)

    def sign(self) -> Tensor:
        """+1 or -1 per channel: the sign of k."""
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
        return self._shifted(self.factor() * shifted)

    def bias_behind(self, bias: Tensor | None, weight: Tensor) -> Tensor:
        """b' = b + w (beta - k * mean) of the layer that the BatchNorm stands in front of."""
        shift = self._shifted(-self.factor() * self.bn.running_mean)
        moved = (weight * self.broadcast(shift, weight)).flatten(1).sum(1)
        return moved if bias is None else bias + moved

    def _shifted(self, values: Tensor) -> Tensor:
        if self.bn.bias is not None:
            values = values + self.bn.bias
        return values.to(self.bn.running_mean.dtype)


class WeightFold(nn.Module):
    """A float weight on its way to a layer with a folded BatchNorm: w in training, k * w in evaluation."""

    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.fold = fold

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.fold.live else self.fold.weight(weight)


class BiasFold(nn.Module):
    """The bias (or None) of a layer with a folded BatchNorm: b in training, k * (b - mean) + beta in evaluation.

    It comes before whatever else asks the fold, and gets what the graph calls the BatchNorm: the module, or its tensors.
    """

    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.fold = fold

    def forward(self, bias: Tensor | None, *norm: Any) -> Tensor | None:
        self.fold.follow(*norm)
        return bias if self.fold.live else self.fold.bias(bias)


class BiasFoldBehind(BiasFold):
    """The bias (or None) of a layer behind a folded BatchNorm: b in training, b + w (beta - k * mean) in evaluation."""

    def forward(self, bias: Tensor | None, weight: Tensor, *norm: Any) -> Tensor | None:
        self.fold.follow(*norm)
        return bias if self.fold.live else self.fold.bias_behind(bias, weight)
