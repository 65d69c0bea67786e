"""Recurrent layers as one operator of a program: torch.export takes torch's own apart step by step, and fixes their length."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pege_fx.decompositions.recurrent import recurrent, run_recurrent


@torch.library.custom_op("pege_fx::recurrent", mutates_args=())
def _recurrent(
    x: Tensor, states: list[Tensor], parameters: list[Tensor], *, kind: str, has_biases: bool, num_layers: int,
    bidirectional: bool, batch_first: bool,
) -> list[Tensor]:  # fmt: skip
    state = states if kind == "lstm" else states[0]
    found = getattr(torch, kind)(x, state, parameters, has_biases, num_layers, 0.0, False, bidirectional, batch_first)
    return [part.clone() for part in found]  # an operator's results share no memory


@_recurrent.register_fake
def _(
    x: Tensor, states: list[Tensor], parameters: list[Tensor], *, kind: str, has_biases: bool, num_layers: int,
    bidirectional: bool, batch_first: bool,
) -> list[Tensor]:  # fmt: skip
    batch = x.shape[0 if batch_first else 1]
    for state in states:
        int(state.shape[0])  # tells torch.export that it is fixed: of all layers
        if state.shape[1] != batch:  # tells torch.export that they are one size, or that neither is free
            _ = int(state.shape[1]), int(batch)
    return [x.new_empty(*x.shape[:2], (1 + bidirectional) * states[0].shape[2]), *(torch.empty_like(state) for state in states)]


def recurrent_as_operator(input: Any, hx: Any = None, *, kind: str, **settings: Any) -> tuple[Any, Any]:
    """Do what ``recurrent`` does, with one operator for the layers, whose length and batch may stay free.

    Packed sequences, states with a projection and dropout that is on stay torch's own operators.
    """
    has_projection = any(name.startswith("weight_hr") for name in settings)
    if isinstance(input, PackedSequence) or has_projection or (settings["training"] and settings["dropout"]):
        return recurrent(input, hx, kind=kind, **settings)
    return run_recurrent(functools.partial(_layers, kind), input, hx, is_lstm=kind == "lstm", **settings)


def _layers(
    kind: str, x: Tensor, state: Any, parameters: list[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    states = [state] if isinstance(state, Tensor) else state
    settings = {"has_biases": has_biases, "num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    return tuple(torch.ops.pege_fx.recurrent(x, states, parameters, kind=kind, **settings))
