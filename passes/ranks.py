"""Number of dimensions of a node's value: from example inputs, or from what the operation itself demands."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from pege_fx.errors import InputError
from pege_fx.passes.graph import arguments, first_argument, module_of, rank_of


class _Recorder(Interpreter):
    """Runs the graph once and notes shape and dtype of every tensor."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["rank"], n.meta["shape"], n.meta["dtype"] = value.ndim, tuple(value.shape), value.dtype
        return value


def record_shapes(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the graph on example inputs (evaluation mode, no gradient) and note the shapes in ``meta``."""
    bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        return  # the interpreter takes no keywords; what needs a shape says so
    modes = {module: module.training for module in gm.modules()}
    try:
        gm.eval()
        with torch.no_grad():
            _Recorder(gm).run(*bound.args)
    except Exception as error:
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in bound.args]
        raise InputError(f"the model fails on the example inputs {shapes}: {type(error).__name__}: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training


_BATCHED = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


def infer_ranks(gm: GraphModule) -> None:
    """Note the number of dimensions that an operation's own contract proves, where no example says it."""
    for node in gm.graph.nodes:
        if "rank" in node.meta:
            continue
        if (rank := _inferred(gm, node)) is not None:
            node.meta["rank"] = rank


def _inferred(gm: GraphModule, node: Node) -> int | None:
    source = rank_of(first_argument(node))
    for cls, rank in _BATCHED.items():
        if module_of(gm, node, cls) is not None:
            return rank
    flatten = module_of(gm, node, nn.Flatten)
    if flatten is not None:
        return 2 if (flatten.start_dim, flatten.end_dim) == (1, -1) else None
    if node.target in (torch.flatten, "flatten"):
        args, kwargs = arguments(node)
        start = kwargs.get("start_dim", args[1] if len(args) > 1 else 0)
        return 2 if start == 1 and len(args) < 3 and "end_dim" not in kwargs else None
    if node.target is F.linear or (module_of(gm, node, nn.Module) is not None and _keeps_rank(gm, node)):
        return source
    return None


def _keeps_rank(gm: GraphModule, node: Node) -> bool:
    module = module_of(gm, node, nn.Module)
    return isinstance(
        module, (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Dropout, nn.Identity, nn.BatchNorm1d, nn.Sigmoid, nn.Tanh)
    )
