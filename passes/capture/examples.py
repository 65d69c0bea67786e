"""Example calls: whatever runs one gets a copy, because a call may write into tensors, lists, dictionaries and caches."""

import copy
from typing import Any, TypeVar

from torch import Tensor
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
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and not (tensors and leaf.is_leaf):  # deepcopy refuses tensors that autograd made
            memo[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad) if tensors else leaf
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return tree_map(lambda leaf: _copied(leaf, memo), value)  # type: ignore[no-any-return]


def _copied(leaf: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(leaf, memo)
    except Exception:
        return leaf
