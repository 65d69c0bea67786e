"""Recurrent layers in ONNX: LSTM, GRU and RNN, one operator for each layer; the gates lie in another order there."""

from typing import Any

from pege_fx.export.quantization import rows
from pege_fx.export.writer import UnmappedError, Value, Writer, writes

_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # ONNX's, by their place in torch: iofc of ifgo, zrh of rzn
_ACTIVATIONS = {"rnn_tanh": "Tanh", "rnn_relu": "Relu"}


@writes("pege_fx.recurrent.default")
def recurrent(
    w: Writer, x: Value, states: list[Value], parameters: list[Value], *, kind: str, has_biases: bool, num_layers: int,
    bidirectional: bool, batch_first: bool,
) -> list[Value]:  # fmt: skip
    """Layer after layer, each on the output of the one before: (sequence, batch, features)."""
    name, kind, directions = kind, kind.split("_")[0].upper(), 1 + bidirectional
    settings: dict[str, Any] = {
        "activations": [_ACTIVATIONS[name]] * directions if kind == "RNN" else None,
        "direction": "bidirectional" if bidirectional else "forward",
        "hidden_size": parameters[1].size(1),
        "linear_before_reset": 1 if kind == "GRU" else None,
    }
    x = w.op("Transpose", x, perm=[1, 0, 2]) if batch_first else x
    last: list[list[Value]] = []
    for layer in range(num_layers):
        each = len(parameters) // num_layers
        given = _parameters(w, kind, parameters[layer * each : (layer + 1) * each], directions)
        initial = [_layer_of(w, part, layer, directions, num_layers) for part in states]
        y, *ends = w.ops(kind, x, *given, None, *initial, count=1 + len(states), **settings)
        last.append(ends)
        x = w.op("Reshape", w.op("Transpose", y, perm=[0, 2, 1, 3]), w.constant([0, 0, -1]))
    x = w.op("Transpose", x, perm=[1, 0, 2]) if batch_first else x
    return [x, *(w.op("Concat", *parts, axis=0) for parts in zip(*last, strict=True))]


@writes("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent_of_torch(
    w: Writer, x: Value, state: Any, parameters: list[Value], has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> list[Value]:  # fmt: skip
    """Layers that stayed in Python, of a fixed length."""
    if len(parameters) != num_layers * (1 + bidirectional) * (4 if has_biases else 2):
        raise UnmappedError("a hidden state with a projection")
    if any(part.ndim > 3 for part in w.result):  # torch 2.11: what reads the states is traced with the wrong shapes
        raise UnmappedError("this torch says that its last states have four dimensions; export with a newer torch")
    states = list(state) if isinstance(state, (list, tuple)) else [state]
    return recurrent(
        w, x, states, parameters, kind=w.target.split(".")[1], has_biases=has_biases, num_layers=num_layers,
        bidirectional=bidirectional, batch_first=batch_first,
    )  # fmt: skip


def _parameters(w: Writer, kind: str, parameters: list[Value], directions: int) -> list[Value | None]:
    """A layer's W, R and B; torch has (weight_ih, weight_hh, bias_ih, bias_hh) for each direction."""
    each = len(parameters) // directions
    ways = [[_gates(w, kind, value) for value in parameters[i * each : (i + 1) * each]] for i in range(directions)]
    made: list[Value | None] = [_stacked(w, [way[part] for way in ways]) for part in (0, 1)]
    if each == 2:
        return [*made, None]
    return [*made, _stacked(w, [w.op("Concat", *way[2:], axis=0) for way in ways])]


def _gates(w: Writer, kind: str, value: Value) -> Value:
    order, size = _GATES[kind], value.size(0)
    assert size is not None
    each = size // len(order)
    return rows(w, value, [gate * each + i for gate in order for i in range(each)])


def _stacked(w: Writer, values: list[Value]) -> Value:
    return w.op("Concat", *(w.op("Unsqueeze", value, w.constant([0])) for value in values), axis=0)


def _layer_of(w: Writer, state: Value, layer: int, directions: int, layers: int) -> Value:
    if layers == 1:
        return state
    first = layer * directions
    return w.op("Slice", state, w.constant([first]), w.constant([first + directions]), w.constant([0]))
