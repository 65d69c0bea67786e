"""A BatchNorm that was merged into a layer for good (``batch_norm="freeze"``), and states of before that are loaded after."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pege_fx.errors import CheckpointError
from pege_fx.modules.batch_norm import Fold, FunctionalBatchNorm
from pege_fx.numerics.spec import Channels


@dataclass(frozen=True, kw_only=True)
class MergedNorm:
    """A hook that merges the BatchNorm of a state of the model before into weight and bias, as ``prepare`` merged it.

    It is called before a state is loaded. A state of the merged model has no BatchNorm, and is left as it is.

    Args:
        name: of the BatchNorm.
        tensors: keys of its running mean, running variance, weight and bias; None for one that it does not have.
        weight, bias: keys of the layer's.
        had_bias: the layer had a bias of its own.
        channels: where the weight keeps the channels of the BatchNorm.
        leads: the BatchNorm stood in front of the layer.
        eps: of the BatchNorm.
    """

    name: str
    tensors: tuple[str | None, ...]
    weight: str
    bias: str
    had_bias: bool
    channels: Channels
    leads: bool
    eps: float

    def __call__(self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
        keys = [None if key is None else prefix + key for key in self.tensors]
        norm = [key for key in keys if key is not None]
        if not any(key in state for key in norm) or not self._is_whole(module):
            return
        layer = [prefix + self.weight, *([prefix + self.bias] if self.had_bias else [])]
        if missing := [key for key in (*norm, *layer) if not isinstance(state.get(key), Tensor)]:
            raise CheckpointError(
                f"the state has the BatchNorm {self.name}, which is merged here, and no {', '.join(missing)}: together "
                "they are the layer.\n  give all of its tensors, or a state of the merged model."
            )
        try:
            weight, bias = self._merged(
                [None if key is None else state.pop(key) for key in keys], *(state[key] for key in layer)
            )
        except RuntimeError as error:
            raise CheckpointError(f"the state has another BatchNorm {self.name} than the model had: {error}") from error
        state[prefix + self.weight], state[prefix + self.bias] = weight, bias
        state.pop(f"{prefix}{self.name}.num_batches_tracked", None)

    def _is_whole(self, module: nn.Module) -> bool:
        """Whether the weight is still a parameter: in a converted model it is none."""
        return any(name == self.weight for name, _ in module.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def _merged(self, norm: list[Tensor | None], weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fold = Fold(FunctionalBatchNorm(tuple(norm), 0.1, self.eps, frozen=True), self.channels)
        merged = fold.bias_behind(bias, weight) if self.leads else fold.bias(bias)
        return fold.weight(weight), merged.to(weight.dtype)
