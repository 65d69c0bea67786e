"""Inlining: what is left of torch's modules in a converted graph becomes functions, and what evaluation skips goes."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.proxy import TraceError

from pege_fx.modules.batch_norm import BatchNorm
from pege_fx.modules.mode import TrainingMode
from pege_fx.passes.capture.patching import LocalTracer
from pege_fx.passes.graph import (
    calls,
    dropout_of,
    first_argument,
    is_torch_module,
    join,
    rank_of,
    remove_dead_nodes,
    replace,
    replace_by_constant,
    write_out,
)


def inline_modules(gm: GraphModule) -> None:
    """Write every module of torch as the functions that it runs in evaluation, on its own parameters.

    A graph of functions and tensors alone can be saved without the code of any class. A module that does not trace, has
    hooks or children stays as it is.
    """
    for node, _ in calls(gm, TrainingMode):
        replace_by_constant(gm, node, False)
    for node, module in calls(gm, nn.Module):
        if is_torch_module(module):
            _inline(gm, node, module)
    for node in list(gm.graph.nodes):
        if _does_nothing(node):
            replace(gm, node, first_argument(node))
    remove_dead_nodes(gm)


def _inline(gm: GraphModule, node: Node, module: nn.Module) -> None:
    shown: nn.Module = module
    if isinstance(module, BatchNorm):
        shown = _Evaluated(module, F.batch_norm)
    elif isinstance(module, _INSTANCE_NORMS) and rank_of(first_argument(node)) == _INSTANCE_NORMS.index(type(module)) + 3:
        shown = _Evaluated(module, F.instance_norm)
    try:
        inner = _NoLeaves().trace(shown)
    except (TraceError, TypeError):  # its forward asks for values
        return
    path = str(node.target)
    write_out(gm, node, inner, lambda name: join(path, name.removeprefix("module.")))


class _NoLeaves(LocalTracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class _Evaluated(nn.Module):
    """A norm by its function, ``F.batch_norm`` or ``F.instance_norm``: its own forward asks for the number of dimensions."""

    def __init__(self, module: Any, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, input: Tensor) -> Tensor:
        norm = self.module
        by_input = norm.running_mean is None
        return self.function(input, norm.running_mean, norm.running_var, norm.weight, norm.bias, by_input, 0.0, norm.eps)


def _does_nothing(node: Node) -> bool:
    """Tell whether a node only drops something in training: dropout, stochastic depth."""
    dropout = dropout_of(node)
    return dropout is not None and dropout[1] is False
