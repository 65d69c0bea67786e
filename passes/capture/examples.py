"""Example calls: whatever runs one gets a copy, because a call may write into tensors, lists, dictionaries and caches."""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")


def fresh(value: T, *, tensors: bool = True) -> T:
    """Return a copy of the arguments of a call, which another call finds as they are now.

    What one object is under two names is one in the copy too. What can not be copied (a generator, a lock) stays itself.

    Args:
        value: arguments, nested as they like.
        tensors: copy tensors too; without it only lists, dictionaries and objects are.

    >>> given = ([1], {"a": [2]})
    >>> fresh(given)[1]["a"] is given[1]["a"]
    False
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors(value, set()):
        if not (tensors and tensor.is_leaf):  # deepcopy refuses tensors that autograd made
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad) if tensors else tensor
    try:
        return copy.deepcopy(value, dict(memo))  # one that fails leaves halves of objects behind
    except Exception:
        return tree_map(lambda leaf: _copied(leaf, memo), value)  # type: ignore[no-any-return]


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors among arguments and in the attributes of objects."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and id(leaf) not in seen and not isinstance(leaf, (type, nn.Module)):
            seen.add(id(leaf))
            yield from _tensors(list(vars(leaf).values()), seen)


def _copied(leaf: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(leaf, dict(memo))
    except Exception:
        return leaf
