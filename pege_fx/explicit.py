"""torch's composite modules in operations that a tracer sees: which are written out, and where."""

from torch import nn

from pege_fx import recurrent, transformer
from pege_fx.attention import ExplicitAttention, can_be_explicit

_EXPLICIT = recurrent.EXPLICIT_LAYERS | recurrent.EXPLICIT_CELLS | transformer.EXPLICIT_LAYERS


def make_explicit(root: nn.Module) -> None:
    """Let torch's attention, transformer and recurrent layers below ``root`` be written out, in place.

    Subclasses stay as they are: their code is their own.
    """
    for module in root.modules():
        if type(module) is nn.MultiheadAttention and can_be_explicit(module):
            module.__class__ = ExplicitAttention
        elif type(module) in _EXPLICIT:
            module.__class__ = _EXPLICIT[type(module)]
