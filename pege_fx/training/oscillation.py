"""Counting the weights that oscillate between two codes.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022): where the best value of a weight lies
between two codes, the straight-through gradient changes its sign with the code, and the weight crosses again and again.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pege_fx.training.quantized_weights import QuantizedWeight

_NO_CODE = torch.iinfo(torch.int16).min


class Oscillations:
    """Counts the weights that change their code and come back, from one question to the next.

    A weight came back if it changed its code twice since the last question, and the second of two changes that follow each
    other led to the code that the first one had left. How many steps lie between the two does not matter.

    Args:
        weights: by the path of their fake-quant.
    """

    def __init__(self, weights: Mapping[str, QuantizedWeight]) -> None:
        self._weights = dict(weights)
        self._codes: dict[str, Tensor] = {}
        self._left: dict[str, Tensor] = {}  # the code before the last change since the question
        self._returned: dict[str, Tensor] = {}
        self.step()

    def step(self) -> None:
        """Look at the codes; call it after each step of the optimizer."""
        for name, weight in self._weights.items():
            if not weight.fq.is_calibrated:
                continue
            codes = weight.codes().to(torch.int16)
            if name not in self._codes:
                self._codes[name] = codes
                self._forget(name)
                continue
            changed = codes != self._codes[name]
            self._returned[name] |= changed & (codes == self._left[name])
            self._left[name] = torch.where(changed, self._codes[name], self._left[name])
            self._codes[name] = codes

    def _forget(self, name: str) -> None:
        self._left[name] = torch.full_like(self._codes[name], _NO_CODE)
        self._returned[name] = torch.zeros_like(self._codes[name], dtype=torch.bool)

    def take(self) -> dict[str, Tensor]:
        """Return the share of each site's weights that came back since the last question, 0-d, and begin anew."""
        shares = {name: returned.float().mean() for name, returned in self._returned.items()}
        for name in shares:
            self._forget(name)
        return shares
