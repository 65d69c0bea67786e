"""Recurrent layers whose weights are arguments, so that a graph can put fake-quants on them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Layers: TypeAlias = Callable[..., tuple[Tensor, ...]]


def recurrent(input: Tensor | PackedSequence, hx: Any = None, *, kind: str, **settings: Any) -> tuple[Any, Any]:
    """What ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` compute: ``run_recurrent`` with torch's own function of this kind.

    Args:
        kind: "lstm", "gru", "rnn_tanh" or "rnn_relu".
    """
    return run_recurrent(getattr(torch, kind), input, hx, is_lstm=kind == "lstm", **settings)


def run_recurrent(
    layers: Layers,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    is_lstm: bool,
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    dropout: float,
    training: bool,
    **parameters: Tensor,
) -> tuple[Any, Any]:
    """Run recurrent layers with the parameters given by name, in the module's order.

    Args:
        layers: ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh``, ``torch.rnn_relu`` or what takes the same arguments.
        input: (L, N, features), (N, L, features) with ``batch_first``, (L, features), or a ``PackedSequence``.
        hx: the first hidden state, for an LSTM (h, c), each (layers * directions, N, size); None: zeros.

    Returns:
        The output, and the last hidden state, as the module would.
    """
    flat = list(parameters.values())
    settings = (bias, num_layers, dropout, training, bidirectional)
    packed = input if isinstance(input, PackedSequence) else None
    x = input.data if isinstance(input, PackedSequence) else input
    unbatched = packed is None and x.dim() == 2
    if unbatched:
        x = x.unsqueeze(int(not batch_first))
        hx = None if hx is None else _each(hx, lambda h: h.unsqueeze(1))
    if hx is None:
        batch = int(packed.batch_sizes[0]) if packed is not None else x.shape[0 if batch_first else 1]
        sizes = [hidden_size] * (1 + is_lstm)
        if projected := [p for name, p in parameters.items() if name.startswith("weight_hr")]:
            sizes[0] = projected[0].shape[0]
        zeros = [x.new_zeros(num_layers * (1 + bidirectional), batch, size) for size in sizes]
        hx = tuple(zeros) if is_lstm else zeros[0]
    elif packed is not None and (order := packed.sorted_indices) is not None:
        hx = _each(hx, lambda h: h.index_select(1, order))
    state = list(hx) if is_lstm else hx
    y: Any
    if packed is None:
        y, *last = layers(x, state, flat, *settings, batch_first)
    else:
        y, *last = layers(x, packed.batch_sizes, state, flat, *settings)
        y = PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        if (order := packed.unsorted_indices) is not None:
            last = [h.index_select(1, order) for h in last]
    if unbatched:
        y, last = y.squeeze(int(not batch_first)), [h.squeeze(1) for h in last]
    return y, tuple(last) if is_lstm else last[0]


def _each(hx: Any, function: Any) -> Any:
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


torch.fx.wrap("recurrent")


def _call(module: nn.RNNBase, kind: str, input: Any, hx: Any) -> Any:
    return recurrent(
        input,
        hx,
        kind=kind,
        hidden_size=module.hidden_size,
        num_layers=module.num_layers,
        bidirectional=module.bidirectional,
        batch_first=module.batch_first,
        bias=module.bias,
        dropout=module.dropout,
        training=module.training if module.dropout else False,
        **dict(module.named_parameters()),
    )


class ExplicitLSTM(nn.LSTM):
    """``nn.LSTM`` as one call of ``recurrent``."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        return _call(self, "lstm", input, hx)


class ExplicitGRU(nn.GRU):
    """``nn.GRU`` as one call of ``recurrent``."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        return _call(self, "gru", input, hx)


class ExplicitRNN(nn.RNN):
    """``nn.RNN`` as one call of ``recurrent``."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        return _call(self, f"rnn_{self.nonlinearity}", input, hx)


def given_or_zeros(hx: Any, input: Tensor, hidden_size: int, is_pair: bool) -> Any:
    """Return the hidden state that a cell is given, or the zeros that it takes without one."""
    if hx is not None:
        return hx
    zeros = input.new_zeros(*input.shape[:-1], hidden_size)
    return (zeros, zeros) if is_pair else zeros


torch.fx.wrap("given_or_zeros")


# Cells, written out: both of their products are edges. The gates' order is torch's.


class ExplicitLSTMCell(nn.LSTMCell):
    """``nn.LSTMCell`` in operations that a tracer sees. Same parameters, same results."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        gates = F.linear(input, self.weight_ih, self.bias_ih)
        if hx is not None:
            gates = gates + F.linear(hx[0], self.weight_hh, self.bias_hh)
        elif self.bias_hh is not None:
            gates = gates + self.bias_hh
        i, f, g, o = (gates[..., n * self.hidden_size : (n + 1) * self.hidden_size] for n in range(4))
        c = torch.sigmoid(i) * torch.tanh(g)
        if hx is not None:
            c = torch.sigmoid(f) * hx[1] + c
        return torch.sigmoid(o) * torch.tanh(c), c


class ExplicitGRUCell(nn.GRUCell):
    """``nn.GRUCell`` in operations that a tracer sees. Same parameters, same results."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        from_input = F.linear(input, self.weight_ih, self.bias_ih)
        h = torch.zeros_like(from_input[..., : self.hidden_size]) if hx is None else hx
        from_hidden = F.linear(h, self.weight_hh, self.bias_hh)
        parts = [slice(n * self.hidden_size, (n + 1) * self.hidden_size) for n in range(3)]
        r, z = (torch.sigmoid(from_input[..., part] + from_hidden[..., part]) for part in parts[:2])
        n = torch.tanh(from_input[..., parts[2]] + r * from_hidden[..., parts[2]])
        return n + z * (h - n)


class ExplicitRNNCell(nn.RNNCell):
    """``nn.RNNCell`` in operations that a tracer sees. Same parameters, same results."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        total = F.linear(input, self.weight_ih, self.bias_ih)
        if hx is not None:
            total = total + F.linear(hx, self.weight_hh, self.bias_hh)
        elif self.bias_hh is not None:
            total = total + self.bias_hh
        return torch.relu(total) if self.nonlinearity == "relu" else torch.tanh(total)


EXPLICIT_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: ExplicitLSTM,
    nn.GRU: ExplicitGRU,
    nn.RNN: ExplicitRNN,
}
# Code that stays Python may call these with a hidden state and without; their graphs take both.
LAYERS, CELLS = (ExplicitLSTM, ExplicitGRU, ExplicitRNN), (ExplicitLSTMCell, ExplicitGRUCell, ExplicitRNNCell)
EXPLICIT_CELLS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTMCell: ExplicitLSTMCell,
    nn.GRUCell: ExplicitGRUCell,
    nn.RNNCell: ExplicitRNNCell,
}
