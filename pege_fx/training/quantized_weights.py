"""The parameters that a prepared model quantizes, with what a training loop asks of them between two steps.

Forward passes see weights one by one, inside the graph. What happens to all of them between two steps (oscillation, freezing,
dampening) reads and writes the parameters themselves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.numerics.discretizer import value_of
from pege_fx.passes.graph import attribute_of, tensor_of


@dataclass(frozen=True)
class QuantizedWeight:
    """A parameter and the fake-quant that reads it.

    Attributes:
        fq: the fake-quant.
        parameter: the continuous weight.
    """

    fq: FakeQuant
    parameter: nn.Parameter

    def continuous(self) -> Tensor:
        """x_c: the weight as the discretizer sees it, differentiable in the weight."""
        return self.fq.method.transform(self.fq.enter(self.parameter))

    def codes(self) -> Tensor:
        """The codes that evaluation uses, as floating point, of the weight's shape."""
        with torch.no_grad():
            return self.fq.codes(self.parameter)

    def discretized(self) -> Tensor:
        """x_q: the values of the codes on the grid of ``continuous``, without gradient."""
        with torch.no_grad():
            return self._values(self.codes())

    def ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value of the grid of ``continuous``, without gradient; they broadcast to the weight."""
        with torch.no_grad():
            limits = self.fq.site.spec.number_format.limits
            low, high = (self._values(torch.full_like(self.parameter, level)) for level in limits)
            return torch.minimum(low, high), torch.maximum(low, high)

    def _values(self, codes: Tensor) -> Tensor:
        scale, zero_point, _ = self.fq.method.grid_of(self.continuous())
        tiling = self.fq.method.tiling
        return tiling.untiled(value_of(tiling.tiles(codes.to(scale)), scale, zero_point), codes)

    @property
    def is_direct(self) -> bool:
        """Whether x_c is the weight times a factor: nothing bends it on the way."""
        return self.fq.method.is_plain

    def factor(self) -> Tensor:
        """x_c over the weight, of its shape, where the weight is direct: the sign or the factor of its BatchNorm."""
        with torch.no_grad():
            return self.fq.enter(torch.ones_like(self.parameter))

    def weights_of(self, codes: Tensor) -> Tensor:
        """Return the weights that lie in the middle of these codes; for a direct weight."""
        with torch.no_grad():
            return (self._values(codes) / self.factor()).to(self.parameter.dtype)


def quantized_weights(gm: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the quantized parameters by the path of their fake-quant.

    Weights that are computed from others (weight norm) are no parameters, and not among them.

    Args:
        gm: a prepared model, or a module that holds graphs.
    """
    found: dict[str, QuantizedWeight] = {}
    for prefix, graph in gm.named_modules():
        if not isinstance(graph, GraphModule):
            continue
        for node in graph.graph.find_nodes(op="call_module"):
            fq = attribute_of(graph, node)
            if not isinstance(fq, FakeQuant) or fq.site.kind != "weight":
                continue
            parameter = tensor_of(graph, node.all_input_nodes[0])
            if isinstance(parameter, nn.Parameter):
                found[f"{prefix}.{node.target}".lstrip(".")] = QuantizedWeight(fq, parameter)
    return found
