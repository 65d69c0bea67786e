"""What a training loop needs beside the scheduler: calibration, parameter groups, the second term of the loss."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pege_fx.errors import InputError, ModelError
from pege_fx.modules.fake_quant import fake_quants
from pege_fx.modules.mode import evaluating
from pege_fx.modules.stages import check_stage, refuse_sharded_grids
from pege_fx.numerics.functional import discretization_error
from pege_fx.training.batches import as_arguments, batches_of, call


def calibrate(gm: GraphModule, batches: Iterable[Any]) -> None:
    """Initialise every activation's grid from float activations, by its method's own rule.

    Args:
        gm: a prepared model.
        batches: an iterable of tensors, of tuples of positional arguments (surplus ones, such as labels, are left out), of
            mappings of keyword arguments or of ``(args, kwargs)``, on the model's device; a single tensor or mapping is one
            batch. The same in every function that takes batches. With ``torch.distributed`` each process gives its own, and
            the grids follow from all of them.

    Raises:
        InputError: if there is no batch, or one does not fit ``forward``.

    >>> import pege_fx
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> calibrate(gm, [torch.randn(8, 4) for _ in range(3)])
    >>> all(site.is_calibrated for site in pege_fx.fake_quants(gm).values())
    True
    """
    check_stage(gm, "prepared")
    refuse_sharded_grids(fake_quants(gm).values(), calibrated=True)
    observe(gm, (as_arguments(gm, batch) for batch in batches_of(batches, "calibrate")))


def observe(gm: GraphModule, calls: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> None:
    """``calibrate`` on (positional, keyword) arguments."""
    sites = list(fake_quants(gm).values())
    count = 0
    with evaluating(gm):
        try:
            for site in sites:
                site.observing = True
            for args, kwargs in calls:
                call(gm, args, kwargs)
                count += 1
            for site in sites:
                site.share_observations()
        finally:
            for site in sites:
                site.finish_observing()
    if not count:
        raise InputError("calibrate got no batch: give at least one.")


def parameter_groups(
    gm: nn.Module, lr: float, quantizer_lr: float | None = None, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """Return optimizer groups: weights with decay; norms and biases, and quantizer parameters, without.

    Args:
        gm: a prepared model.
        lr: of weights, norms and biases.
        quantizer_lr: of scales, clips and intervals; default: ``lr``.
        weight_decay: of parameters with two dimensions or more.

    Raises:
        ModelError: if ``gm`` was not prepared.

    >>> import pege_fx
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> [(group["name"], group["weight_decay"]) for group in parameter_groups(gm, lr=1e-3)]
    [('weights', 0.0001), ('norms and biases', 0.0), ('quantizers', 0.0)]
    """
    check_stage(gm, "prepared")
    quantizer = {id(p) for fq in fake_quants(gm).values() for p in fq.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms and biases": [], "quantizers": []}
    for parameter in gm.parameters():
        if not parameter.requires_grad:
            continue
        name = "quantizers" if id(parameter) in quantizer else "weights" if parameter.ndim > 1 else "norms and biases"
        groups[name].append(parameter)
    settings = {
        "weights": {"lr": lr, "weight_decay": weight_decay},
        "norms and biases": {"lr": lr, "weight_decay": 0.0},
        "quantizers": {"lr": lr if quantizer_lr is None else quantizer_lr, "weight_decay": 0.0},
    }
    return [{"name": name, "params": params} | settings[name] for name, params in groups.items() if params]


def discretization_loss(gm: nn.Module) -> Tensor:
    """Return the second term of PEGE's co-optimized objective: sum over sites of λ/2 * ||x_c - y||^2, 0-d.

    Of the last training forward, and while its autograd graph is alive: call it between forward and backward. It is
    differentiable in x_c, with y held constant: STE and this loss together have exactly PEGE's gradients.

    Args:
        gm: a prepared model in training, not compiled.

    Raises:
        ModelError: if the model has no such forward: not prepared, in evaluation, compiled, or after backward.

    >>> import pege_fx
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> scheduler = pege_fx.PEGEScheduler(gm, total_steps=10)
    >>> outputs = gm(torch.randn(8, 4))
    >>> discretization_loss(gm).item() > 0
    True
    """
    terms = [
        0.5 * site.lambda_ * discretization_error(*seen)
        for site in fake_quants(gm).values()
        if (seen := site.last_forward()) is not None
    ]
    if not terms:
        raise ModelError(
            "there is no training forward of a prepared model to look at.\n"
            "  call discretization_loss between forward and backward, in train() mode, on an uncompiled model."
        )
    return torch.stack(terms).sum()
