"""Verification: a graph as planned passes, and every way to tamper with it is told."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import VerifyError, passes
from pege_fx.modules.fake_quant import FakeQuant, Site
from pege_fx.numerics.spec import QuantSpec
from pege_fx.passes import verify

WHOLE = pege_fx.QuantPolicy((pege_fx.Rule(weight="4", input="4", output="8"),))


def prepared() -> passes.Program:
    """Up to the plan and its insertion; ``verify`` itself has not run."""
    program = passes.Program(model=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    return passes.run(program, [passes.CaptureModel(), *pege_fx.prepare_passes(WHOLE)[:-1]])


def fake_quant(gm: GraphModule, name: str) -> torch.fx.Node:
    (node,) = (node for node in gm.graph.nodes if node.name == name)
    return node


def remove(gm: GraphModule) -> None:
    node = fake_quant(gm, "_2_weight_fq")
    node.replace_all_uses_with(node.all_input_nodes[0])
    gm.graph.erase_node(node)


def remove_output(gm: GraphModule) -> None:
    node = fake_quant(gm, "_2_fq")
    node.replace_all_uses_with(node.all_input_nodes[0])
    gm.graph.erase_node(node)


def swap(gm: GraphModule) -> None:
    fake_quant(gm, "_1_fq").target = "input_1_fq"  # the signed one of the other layer


def change_the_format(gm: GraphModule) -> None:
    fq = gm.get_submodule("2.weight_fq")
    assert isinstance(fq, FakeQuant)
    fq.site = Site(name=fq.site.name, kind="weight", spec=QuantSpec(bits=2), rule="tampered")


def replace_by_identity(gm: GraphModule) -> None:
    gm.set_submodule("2.weight_fq", nn.Identity())


def rename(gm: GraphModule) -> None:
    fake_quant(gm, "_2").name = "renamed"


def add(gm: GraphModule) -> None:
    relu = fake_quant(gm, "_1")
    with gm.graph.inserting_after(relu):
        gm.graph.call_module("input_1_fq", (relu,))


TAMPERED = [
    (remove, "2: weight should read a fake-quant of 4, and reads _2_weight."),
    (remove_output, "2: output should read a fake-quant of 8, and reads output"),
    (swap, "2: input should read a fake-quant of 4, and reads _1_fq"),
    (change_the_format, "2: weight should read a fake-quant of 4, and reads _2_weight_fq"),
    (replace_by_identity, "2: weight should read a fake-quant of 4"),
    (rename, "2: its node _2 is gone from the graph"),
    (add, "fake-quants that the plan does not name: input_1_fq_1"),
]


@pytest.mark.parametrize(("tamper", "words"), TAMPERED, ids=[tamper.__name__ for tamper, _ in TAMPERED])
def test_a_tampered_graph_is_told_where_and_how(tamper: passes.Pass, words: str) -> None:
    program = prepared()
    verify(program)
    passes.apply(tamper, program)
    with pytest.raises(VerifyError, match=re.escape(words)):
        verify(program)


def test_a_user_pass_between_plan_and_verification_is_caught() -> None:
    pipeline = pege_fx.prepare_passes(WHOLE)
    pipeline.insert(-1, remove)
    with pytest.raises(VerifyError, match="a pass between the plan and here removed or replaced it") as caught:
        pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), WHOLE, passes=pipeline)
    assert caught.value.__notes__ == ["in pass verify"]


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(x)


def test_inputs_on_one_scale_have_one_fake_quant() -> None:
    policy = pege_fx.QuantPolicy((pege_fx.Rule(function="add", input="4", shared_scale=True),))
    program = passes.Program(model=Sum())
    gm = passes.run(program, [passes.CaptureModel(), *pege_fx.prepare_passes(policy)[:-1]]).root
    verify(program)
    _, second = gm.graph.find_nodes(op="call_module", target="add_inputs_fq")
    gm.add_submodule("another", copy.deepcopy(gm.get_submodule("add_inputs_fq")))
    second.target = "another"
    with pytest.raises(VerifyError, match="add: input and other should share one fake-quant, and do not"):
        verify(program)
