"""The strengths of EWGS from the curvature of the loss, so that PEGE is compared with EWGS at its best."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pege_fx.errors import ModelError
from pege_fx.modules.fake_quant import FakeQuant, fake_quants
from pege_fx.modules.stages import check_stage
from pege_fx.numerics.functional import replacement_mask, site_key
from pege_fx.training.batches import each_batch


def update_ewgs(
    gm: nn.Module, loss_of: Callable[[Any], Tensor], batches: Iterable[Any], *, draws: int = 10, seed: int = 0
) -> dict[str, float]:
    """Set δ of every EWGS site and return it: δ = max(0, (Tr H / N) / (3 std g)), the mean over the batches.

    g and H are the gradient and the Hessian of the loss in the site's N quantized values, in units of the clipping range as
    δ itself is. The trace is Hutchinson's: v^T H v for random signs v has the mean Tr H. All sites draw at once: what one
    site's v contributes to another's product has the mean zero. The signs come from a hash, and are the same on every
    device. The paper (Lee et al., CVPR 2021, eq. 8) does this every 10 epochs on 3 batches.
    Downstream quantizers count as STE meanwhile. All but δ stays as it is: parameters, gradients, buffers, random numbers.

    Args:
        gm: a prepared model, some of whose sites have the estimator "ewgs".
        loss_of: a batch -> the loss, through ``gm`` itself (not compiled, nor wrapped); in training mode.
        batches: three or so.
        draws: of v for each batch.
        seed: of the draws.

    Raises:
        ModelError: if no site of the model has the estimator EWGS.
        InputError: if there is no batch.

    >>> import pege_fx
    >>> policy = pege_fx.QuantPolicy((pege_fx.Rule(weight=pege_fx.QuantSpec(bits=4, estimator="ewgs")),))
    >>> gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 2)), policy)
    >>> list(update_ewgs(gm, lambda x: gm(x).square().mean(), [torch.randn(8, 4)]))
    ['0.weight_fq']
    """
    check_stage(gm, "prepared")
    sites = {name: site for name, site in fake_quants(gm).items() if site.site.spec.estimator == "ewgs"}
    if not sites:
        raise ModelError('the model has no EWGS site: prepare it with estimator="ewgs", or leave update_ewgs out.')
    buffers = {name: buffer.clone() for name, buffer in gm.named_buffers()}
    keys = (site_key(seed, f"signs {number}") for number in itertools.count())
    found: list[dict[str, float]] = []
    try:
        for site in sites.values():
            site.get_buffer("strength").zero_()
        for batch in each_batch(batches, "update_ewgs"):
            found.append(_strengths(sites, functools.partial(loss_of, batch), draws, keys))
    finally:
        with torch.no_grad():
            for name, buffer in gm.named_buffers():
                buffer.copy_(buffers[name])
    strengths = {name: max(0.0, sum(one.get(name, 0.0) for one in found) / len(found)) for name in sites}
    for name, site in sites.items():
        site.get_buffer("strength").fill_(strengths[name])
    return strengths


def _strengths(sites: dict[str, FakeQuant], loss_of: Callable[[], Tensor], draws: int, keys: Iterator[int]) -> dict[str, float]:
    """(Tr H / N) / (3 std g) of each site that a batch reaches; may be negative."""
    seen: dict[str, dict[tuple[int, ...], Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, x, y: seen.setdefault(name, {}).update({x[1:2]: y})  # by the input's number, if it has one

    hooks = [site.register_forward_hook(note(name)) for name, site in sites.items()]
    try:
        with torch.enable_grad():
            loss = loss_of()
    finally:
        for hook in hooks:
            hook.remove()
    values = [value for inputs in seen.values() for value in inputs.values()]
    spans = [sites[name].span(value).double() for name, inputs in seen.items() for value in inputs.values()]
    gradients = torch.autograd.grad(loss, values, create_graph=True)
    traces = [torch.zeros((), dtype=torch.float64, device=value.device) for value in values]
    for _ in range(draws):
        signs = [_signs(value, next(keys)) for value in values]
        products = torch.autograd.grad(gradients, values, signs, retain_graph=True, materialize_grads=True)
        for trace, sign, product, span in zip(traces, signs, products, spans, strict=True):
            trace += (span.square() * sign * product).sum(dtype=torch.float64) / draws
    found, left = {}, iter(zip(traces, gradients, spans, strict=True))
    for name, inputs in seen.items():
        own = [next(left) for _ in inputs]
        gradient = torch.cat([(span * gradient.detach()).flatten() for _, gradient, span in own])
        trace, spread = torch.stack([trace for trace, *_ in own]).sum(), 3 * gradient.std(correction=0)
        found[name] = float(trace / gradient.numel() / spread) if float(spread) > 0 else 0.0
    return found


def _signs(like: Tensor, key: int) -> Tensor:
    """Random signs, of the shape, dtype and device of a tensor."""
    half = torch.tensor(0.5, device=like.device)
    positive = replacement_mask(torch.tensor(key, dtype=torch.int32, device=like.device), half, like.shape)
    return 2 * positive.to(like.dtype) - 1
