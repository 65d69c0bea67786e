"""How a converted model is called when it is exported or verified: its arguments in the order of ``forward``."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from pege_fx.errors import InputError
from pege_fx.modules.mode import evaluating, preserve_state
from pege_fx.training.batches import Call

TOKEN_TYPES = (torch.int64, torch.int32)


def by_name(gm: GraphModule, call: Call) -> dict[str, Any]:
    """Return the arguments of a call by the names of ``forward``'s parameters, without those that are left out.

    Raises:
        InputError: if they do not fit.
    """
    return dict(_bound(gm, call).arguments)


def in_order(gm: GraphModule, call: Call) -> Call:
    """Return a call with every argument by position that can be, those that are left out with their defaults.

    >>> import torch
    >>> gm = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    >>> in_order(gm, ((), {"input": 1}))
    ((1,), {})

    Raises:
        InputError: if the arguments do not fit ``forward``.
    """
    bound = _bound(gm, call)
    bound.apply_defaults()
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif kind is inspect.Parameter.KEYWORD_ONLY:
            kwargs[name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _bound(gm: GraphModule, call: Call) -> inspect.BoundArguments:
    signature = inspect.signature(gm.forward)
    args, kwargs = call
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the model fails on inputs of shapes {shapes_of(call)}: they do not fit forward{signature}: {error}.\n"
            f"  given: {len(args)} positional, keywords {sorted(kwargs) or 'none'}."
        ) from error


def copied(call: Call) -> Call:
    """Return a call on copies of its tensors: none shares its memory with another, and none is written into."""
    made: Call = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, call)
    return made


def tensors_of(call: Call) -> list[Tensor]:
    """Return the tensors among the arguments, in order: the inputs of a file."""
    return [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]


def has_tokens(call: Call) -> bool:
    """Tell whether an input is of token numbers: whole ones, (batch, length)."""
    return any(x.ndim == 2 and x.shape[1] > 1 and x.dtype in TOKEN_TYPES for x in tensors_of(call))


def shapes_of(call: Call) -> list[Any]:
    """Return the shapes of the arguments, for an error: of what is no tensor, the name of its type."""
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in tree_leaves(call)]


def try_call(gm: GraphModule, call: Call) -> Any:
    """Return what the model gives, and leave it and the arguments as they were.

    Raises:
        InputError: with the shapes, if it fails.
    """
    args, kwargs = copied(call)
    try:
        with preserve_state(gm.modules()), evaluating(gm):
            return gm.forward(*args, **kwargs)  # a call of a GraphModule would print the traceback
    except Exception as error:
        raise InputError(f"the model fails on inputs of shapes {shapes_of(call)}: {type(error).__name__}: {error}") from error
