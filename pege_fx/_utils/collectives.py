"""Several processes: which one this is, figures that all agree on, tensors that are sharded among them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """Which process this is, and of how many: (0, 1) without ``torch.distributed``."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_shared() -> bool:
    """Tell whether this process works with others."""
    return rank_and_size()[1] > 1


def total(figures: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if is_shared():
        dist.all_reduce(figures, dist.ReduceOp.SUM)
    return figures


def range_of_all(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest ``low`` and the largest ``high`` of all processes."""
    if not is_shared():
        return low, high
    both = torch.stack([-low, high])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return -both[0], both[1]


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in order of rank."""
    if not is_shared():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_first_rank(action: Callable[[], None]) -> None:
    """Do something on the first rank while the others wait; an error there is raised on every rank."""
    failed: list[Exception | None] = [None]
    if rank_and_size()[0] == 0:
        try:
            action()
        except Exception as error:
            failed = [error]
    if is_shared():
        dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def _dtensor(value: Any) -> Any:
    """The value as a DTensor, or None; nothing is imported where none can be."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    return value if isinstance(value, DTensor) else None


def is_sharded(value: Any) -> bool:
    """Tell whether a tensor lies in parts on several processes."""
    return _dtensor(value) is not None


def whole(tree: Any) -> Any:
    """A nested structure with its sharded tensors put together; every rank takes part."""
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(value) for value in tree)
    sharded = _dtensor(tree)
    return tree if sharded is None else sharded.full_tensor()


def laid_out_as(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sharded as ``model`` is."""
    sharded = _dtensor(model)
    if sharded is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(model.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
