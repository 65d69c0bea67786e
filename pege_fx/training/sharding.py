"""Training on several processes: what ``fully_shard`` needs to know of a prepared model. DDP needs nothing."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.fx import GraphModule

from pege_fx.errors import ModelError
from pege_fx.modules.fake_quant import fake_quants
from pege_fx.modules.stages import graph_of


def shard(gm: GraphModule, *, mesh: DeviceMesh | None = None, **options: Any) -> GraphModule:
    """Apply ``fully_shard`` (FSDP2) to a prepared model in place, and return it.

    Graphs inside modules that stay Python are sharded one by one, the rest with the model. Scales, clips and intervals,
    a few numbers each, stay whole on every process; their gradients are averaged as those of the weights are. Make the
    optimizer after this. ``save`` puts the model together again; ``convert`` what was loaded without sharding.

    Args:
        gm: a prepared model.
        mesh: of the processes that share the model; default: all of them.
        options: further arguments of ``fully_shard``.

    Raises:
        ModelError: if ``gm`` was not prepared, or there is no process group.

    >>> import torch, pege_fx, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # under torchrun: without arguments
    >>> gm = pege_fx.prepare(torch.nn.Sequential(torch.nn.Linear(4, 2)), "W4A4", torch.randn(2, 4))
    >>> type(shard(gm).get_parameter("0.weight")).__name__
    'DTensor'
    >>> dist.destroy_process_group()
    """
    gm = graph_of(gm, "prepared")
    if not dist.is_initialized():
        raise ModelError("there is no process group: run under torchrun, and call torch.distributed.init_process_group first.")
    whole = {parameter for site in fake_quants(gm).values() for parameter in site.parameters()}
    for parameter in gm.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard takes no channels_last weights
    graphs = [module for module in gm.modules() if isinstance(module, GraphModule) and module is not gm]
    for module in [*reversed(graphs), gm]:
        fully_shard(module, mesh=mesh, ignored_params=whole, **options)
    for parameter in whole:
        parameter.register_post_accumulate_grad_hook(_averaging(mesh))  # type: ignore[no-untyped-call]
    return gm


def _averaging(mesh: DeviceMesh | None) -> Any:
    groups = [None] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]

    def average(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        for group in groups:
            dist.all_reduce(gradient, group=group)
            gradient /= dist.get_world_size(group)

    return average
