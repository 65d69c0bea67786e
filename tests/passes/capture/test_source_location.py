"""Places: a node knows the line of the model that made it."""

import copy

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx.passes.capture import source_location
from pege_fx.passes.capture.tiers import capture
from pege_fx.passes.graph import where


class Lines(nn.Module):
    """One operation to a line, some of them in torch's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0]
        x = self.head(x)
        return x.softmax(-1)


def test_a_node_knows_the_line_that_made_it() -> None:
    gm = pege_fx.prepare(Lines().eval(), "W4A4", (torch.randn(2, 3, 8),))
    first = Lines.forward.__code__.co_firstlineno

    for model in (gm, pege_fx.convert(gm), pege_fx.convert(copy.deepcopy(gm))):
        lines = {node.name: where(node) for node in model.graph.nodes}
        for name, line in (("linear", 1), ("head_0", 2), ("head_1", 2), ("softmax_1", 3)):
            assert lines[name] == f" ({__file__}:{first + line})", name
    (x,) = gm.graph.find_nodes(op="placeholder")
    assert where(x) == ""  # not the line that asked for the trace


def test_a_model_of_torch_s_own_layers_has_no_line() -> None:
    assert not any(where(node) for node in capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU())).root.graph.nodes)


@pytest.mark.parametrize("filename", ["<stdin>", "<string>", "<ipython-input-3-0a1b>"])
def test_what_a_user_typed_is_the_model_s_own_code(filename: str) -> None:
    scope = {"line": source_location.line}
    exec(compile("def forward():\n    return line()\n\ndef fails():\n    raise ValueError(0)", filename, "exec"), scope)
    assert scope["forward"]() == f'File "{filename}", line 2, in forward'
    with pytest.raises(ValueError, match="0") as raised:
        scope["fails"]()
    assert source_location.where_raised(raised.value) == f"{filename}:5 in fails"
