"""BatchNorm's running statistics, computed anew for the weights as they are deployed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pege_fx._utils.collectives import is_shared, rank_and_size, total
from pege_fx.errors import InputError, ModelError
from pege_fx.modules.batch_norm import FunctionalBatchNorm
from pege_fx.modules.mode import evaluating
from pege_fx.modules.stages import check_stage
from pege_fx.training.batches import as_arguments, batches_of, call

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FunctionalBatchNorm)


def reestimate_batch_norm(gm: nn.Module, batches: Iterable[Any]) -> int:
    """Set the running statistics of every BatchNorm to their mean over batches, with fully quantized weights and activations.

    Running averages lag behind weights whose codes change from step to step, and in networks with depthwise convolutions that
    alone can cost points of accuracy (Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
    section 3.1). Call it before evaluation or ``convert``, with a few dozen training batches of the size of training.

    Mean and (unbiased) variance are averaged over batches, each with the same weight; batches are normalized by their own
    statistics on the way, as in training. Dropout is off. Modes, random numbers and ``num_batches_tracked`` are left alone, and
    so are BatchNorms that somebody froze: in evaluation while the model trains.

    Args:
        gm: a prepared model, with ``batch_norm="train"`` or ``"keep"``.
        batches: as ``calibrate`` takes them. With ``torch.distributed`` each process gives its own, and the statistics are
            averaged over all.

    Returns:
        the number of batches.

    Raises:
        ModelError: if there is no BatchNorm with running statistics: none in the model, or merged by ``batch_norm="freeze"``.
        InputError: if there is no batch, or one does not fit ``forward``.

    >>> import pege_fx
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 3, 8, 8))
    >>> reestimate_batch_norm(gm, [torch.randn(8, 3, 8, 8) for _ in range(4)])
    4
    """
    check_stage(gm, "prepared")
    norms = [module for module in gm.modules() if isinstance(module, _BATCH_NORMS) and module.running_mean is not None]
    norms = [norm for norm in norms if not getattr(norm, "frozen", False) and (norm.training or not gm.training)]
    if not norms:
        raise ModelError(
            "there is no BatchNorm whose statistics could be estimated: the model has none, or they are frozen or merged.\n"
            '  prepare with batch_norm="train" or "keep".'
        )
    count = 0
    with _estimating(gm, norms):
        for batch in batches_of(batches, "reestimate_batch_norm"):
            for norm in norms:
                norm.momentum = 1.0 / (count + 1)  # the running average is the mean so far
            args, kwargs = as_arguments(gm, batch)
            call(gm, args, kwargs)
            count += 1
    if not count:
        raise InputError("reestimate_batch_norm got no batch: give at least one.")
    if is_shared():
        for tensor in _statistics(norms):
            tensor.copy_(total(tensor.clone()) / rank_and_size()[1])
    return count


@contextmanager
def _estimating(gm: nn.Module, norms: list[Any]) -> Iterator[None]:
    """All in evaluation but the BatchNorms; what they count and how they average comes back after."""
    kept = [(norm, norm.momentum, getattr(norm, "num_batches_tracked", None)) for norm in norms]
    counts = [None if counted is None else counted.clone() for *_, counted in kept]
    try:
        with evaluating(gm):
            for norm in norms:
                norm.training = True
            yield
    finally:
        with torch.no_grad():
            for (norm, momentum, counted), count in zip(kept, counts, strict=True):
                norm.momentum = momentum
                if counted is not None and count is not None:
                    counted.copy_(count)


def _statistics(norms: list[Any]) -> Iterator[Tensor]:
    for norm in norms:
        yield norm.running_mean
        yield norm.running_var
