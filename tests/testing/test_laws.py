"""Every law is broken by a rewrite that breaks it, and by the right name; rewrites that keep them pass."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.optimization import fuse

import pege_fx
from pege_fx import InputError, LawError, PegeError
from pege_fx.passes.graph import calls, first_argument, remove_dead_nodes
from pege_fx.testing import LAWS, Case, Network, check_pass, graph_modules, networks
from pege_fx.testing.laws import _KEPT

GRAPHS = graph_modules()
RELUS = graph_modules().filter(lambda case: "= relu_" in case.code)
NORMS = graph_modules(inputs=1).filter(lambda case: "= norm_" in case.code)
CONVS = graph_modules(max_nodes=4).filter(lambda case: "= conv_1" in case.code)


def drop_relus(gm: GraphModule) -> None:
    for node, _ in calls(gm, nn.ReLU):
        node.replace_all_uses_with(first_argument(node))
        gm.graph.erase_node(node)


def fails(gm: GraphModule) -> None:
    raise ValueError("no such thing")


def returns_nothing_useful(gm: GraphModule) -> int:
    return 3


def leaves_the_graph_broken(gm: GraphModule) -> None:
    for node, _ in calls(gm, nn.Conv2d):
        node.target = "no.such.module"


def forgets_to_recompile(gm: GraphModule) -> GraphModule:
    for node, _ in calls(gm, nn.Conv2d):
        node.target = "conv_other"
        gm.add_module("conv_other", nn.Conv2d(4, 4, 1))
    return gm


def changes_its_argument(gm: GraphModule) -> GraphModule:
    result = copy.deepcopy(gm)
    for _, conv in calls(gm, nn.Conv2d):
        conv.weight.data.zero_()
    return result


COUNT = itertools.count()


def depends_on_a_counter(gm: GraphModule) -> None:
    for node, _ in calls(gm, nn.Conv2d):
        node.name = f"conv_{next(COUNT)}"


def goes_to_eval(gm: GraphModule) -> None:
    gm.eval()


def adds_an_identity(gm: GraphModule) -> None:
    gm.add_module("identity", nn.Identity())
    for node, _ in calls(gm, nn.Conv2d):
        with gm.graph.inserting_after(node):
            again = gm.graph.call_module("identity", (node,))
        node.replace_all_uses_with(again, lambda user, again=again: user is not again)


def detaches(gm: GraphModule) -> None:
    for node, _ in calls(gm, nn.Conv2d):
        if any(user.target == "detach" for user in node.users):
            continue
        with gm.graph.inserting_after(node):
            detached = gm.graph.call_method("detach", (node,))
        node.replace_all_uses_with(detached, lambda user, detached=detached: user is not detached)


def renames_a_module(gm: GraphModule) -> None:
    for node, conv in calls(gm, nn.Conv2d):
        if not str(node.target).startswith("renamed"):
            gm.add_module(f"renamed_{node.target}", conv)
            node.target = f"renamed_{node.target}"
    gm.delete_all_unused_submodules()


class Unpicklable(nn.ReLU):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("not me")

    def __deepcopy__(self, memo: Any) -> "Unpicklable":
        return Unpicklable()


def puts_in_what_can_not_be_pickled(gm: GraphModule) -> None:
    for node, relu in calls(gm, nn.ReLU):
        if type(relu) is nn.ReLU:
            gm.set_submodule(str(node.target), Unpicklable())


def computes_in_float32(gm: GraphModule) -> None:
    for node, _ in calls(gm, nn.ReLU):
        node.op, node.target = "call_function", relu_in_float32


def relu_in_float32(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x.float()).to(x.dtype)


def drops_dead_code(gm: GraphModule) -> None:
    """As torch does it."""
    gm.graph.eliminate_dead_code()


@pytest.mark.parametrize(
    ("rewrite", "preserves", "law"),
    [
        (drop_relus, "function", "training"),
        (drop_relus, "bits", "training"),
        (drop_relus, "structure", "structure"),
        (drop_relus, "evaluation", "evaluation"),
        (fails, "nothing", "runs"),
        (returns_nothing_useful, "nothing", "runs"),
        (leaves_the_graph_broken, "nothing", "lint"),
        (forgets_to_recompile, "function", "lint"),
        (changes_its_argument, "function", "untouched"),
        (depends_on_a_counter, "structure", "deterministic"),
        (goes_to_eval, "function", "modes"),
        (adds_an_identity, "bits", "idempotent"),
        (detaches, "bits", "gradients"),
        (drops_dead_code, "bits", "statistics"),
        (renames_a_module, "bits", "state"),
        (puts_in_what_can_not_be_pickled, "bits", "copies"),
        (computes_in_float32, "bits", "dtype"),
    ],
)
def test_a_broken_law_is_named(rewrite: Callable[[GraphModule], Any], preserves: Any, law: str) -> None:
    with pytest.raises(LawError, match=f"^{rewrite.__name__} breaks a law: {law}. ") as found:
        check_pass(rewrite, preserves, graphs=graph_modules(max_nodes=4), max_examples=300)
    assert isinstance(found.value, AssertionError)
    assert isinstance(found.value, PegeError)
    assert "GraphCase.of(" in str(found.value)


def test_every_law_can_be_broken_by_name() -> None:
    (mark,) = test_a_broken_law_is_named.pytestmark  # type: ignore[attr-defined]
    assert {law for _, _, law in mark.args[1]} == set(LAWS) - {"device"}


def test_the_message_has_the_smallest_graph_as_code_and_what_happens_to_it() -> None:
    with pytest.raises(LawError) as found:
        check_pass(drop_relus, graphs=RELUS)
    lines = str(found.value).splitlines()
    assert lines[0] == "drop_relus breaks a law: training. The same function in training mode."
    assert "the output differs by" in lines[1]
    code = '''
    GraphCase.of("""
    def forward(x):
        a = relu_1(x)
        return a
    """)'''
    assert code in str(found.value)
    assert lines[-1] == "    - a = relu_1(x): ReLU()"


def take_notes(gm: GraphModule) -> None:
    for number, node in enumerate(gm.graph.nodes):
        node.meta["number"] = number


def out_of_place(gm: GraphModule) -> GraphModule:
    result = copy.deepcopy(gm)
    remove_dead_nodes(result)
    result.recompile()
    return result


@pytest.mark.parametrize(
    ("rewrite", "preserves", "skipped"),
    [
        (remove_dead_nodes, "bits", {"untouched"}),
        (take_notes, "structure", {"untouched"}),
        (out_of_place, "function", set()),
    ],
)
def test_a_rewrite_that_keeps_every_law_passes(rewrite: Any, preserves: Any, skipped: set[str]) -> None:
    verdict = check_pass(rewrite, preserves, graphs=GRAPHS, max_examples=24)
    assert set(verdict.skipped) - {"device"} == skipped
    assert set(verdict.laws) == _KEPT[preserves] - set(verdict.skipped)
    assert verdict.graphs == 24
    assert 0 < verdict.changed <= 24
    assert str(verdict).startswith(f"{rewrite.__name__} keeps the ")


def test_the_same_seed_gives_the_same_verdict() -> None:
    first, again, other = (str(check_pass(remove_dead_nodes, graphs=GRAPHS, max_examples=12, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert other.splitlines()[0].startswith("remove_dead_nodes keeps the function: 12 laws hold on 12 graphs")


def test_of_a_plain_pair_the_shapes_are_shown_and_not_all_values() -> None:
    with pytest.raises(LawError) as found:
        check_pass(drop_relus, graphs=st.just((nn.Sequential(nn.ReLU()), (torch.randn(3, 50),))), max_examples=3)
    shown = str(found.value).split("the smallest graph found:\n")[1].split("  what the rewrite")[0]
    assert [line.strip() for line in shown.splitlines()] == [
        "Sequential(",
        "(0): ReLU()",
        ")",
        "on torch.float32 of shape (3, 50)",
    ]


def test_a_law_may_be_left_out_and_nothing_is_promised_for_function() -> None:
    verdict = check_pass(adds_an_identity, "bits", without=("idempotent", "copies"), graphs=CONVS, max_examples=10)
    assert not {"idempotent", "copies"} & set(verdict.laws)
    assert check_pass(drop_relus, "nothing", graphs=GRAPHS, max_examples=20).changed > 0


def test_a_rewrite_that_never_changes_anything_has_not_been_checked() -> None:
    with pytest.raises(InputError, match=r"<lambda> changed none of 10 graphs.*\n  give graphs="):
        check_pass(lambda gm: None, graphs=GRAPHS, max_examples=10)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"preserves": "all"}, "give one of structure, bits"), ({"without": ["idempotence"]}, "closest: idempotent")],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_pass(remove_dead_nodes, **options)


def in_front(layer: nn.Module) -> Any:
    return networks(inputs=(1,), max_layers=2).map(lambda case: Case(nn.Sequential(layer, case.network), case.inputs))


def test_what_clips_where_random_numbers_seldom_are_is_tried_there() -> None:
    def clips_no_more(gm: GraphModule) -> None:
        for node, _ in calls(gm, nn.ReLU6):
            with gm.graph.inserting_before(node):
                node.replace_all_uses_with(gm.graph.call_function(torch.relu, (first_argument(node),)))
            gm.graph.erase_node(node)

    with pytest.raises(LawError, match="clips_no_more breaks a law: evaluation"):
        check_pass(clips_no_more, "bits", graphs=in_front(nn.ReLU6()), max_examples=10)


class Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.abs().max() < 6, "too large")
        return x.relu().relu()


def test_graphs_that_take_no_larger_inputs_are_tried_on_their_own() -> None:
    verdict = check_pass(drop_second_relu, "bits", graphs=st.just((Picky(), (torch.ones(2),))), max_examples=1)
    assert "evaluation" in verdict.laws


def drop_second_relu(gm: GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_method", target="relu"):
        if first_argument(node).target == "relu":
            node.replace_all_uses_with(first_argument(node))
            gm.graph.erase_node(node)


def test_a_filter_that_lets_nothing_through_is_named() -> None:
    nothing = st.integers().filter(lambda _: False)
    with pytest.raises(InputError, match=r"its filter lets none through\.\n  make the pattern with map"):
        check_pass(drop_relus, graphs=nothing, max_examples=5)


def test_modules_of_one_s_own_are_traced() -> None:
    cases = st.sampled_from([nn.Sequential(nn.Tanh()), nn.Sequential(nn.Linear(3, 3), nn.ReLU())])
    with pytest.raises(LawError, match=r"_1 = .*ReLU"):
        check_pass(drop_relus, graphs=cases.map(lambda model: (model, (torch.randn(9, 3),))), max_examples=10)


class Wrapped(nn.Sequential):
    def forward(self, *inputs: torch.Tensor) -> Any:
        return self[0](*inputs)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            Wrapped(nn.ReLU()),
            r"does not trace a module of graphs=: TraceError(.|\n)*Wrapped\((.|\n)*\n  let the strategy give a GraphModule",
        ),
        (nn.Linear(5, 2), r"fails on its own inputs, before any rewrite: RuntimeError(.|\n)*Linear\(in_features=5"),
    ],
)
def test_a_graph_that_never_ran_is_not_blamed_on_the_rewrite(module: nn.Module, said: str) -> None:
    graphs = st.just((module, (torch.randn(2, 4),)))
    with pytest.raises(InputError, match=said):
        check_pass(lambda gm: None, graphs=graphs, max_examples=3)


def test_torch_s_dead_code_elimination_takes_methods_in_place_for_dead() -> None:
    """Found by ``check_pass`` itself."""
    cases = st.sampled_from([Case.of(Network([layer])) for layer in ("conv", "in place")])
    with pytest.raises(LawError, match=r"(?s)breaks a law: training.*'in place'.*- add_ = add_"):
        check_pass(drops_dead_code, graphs=cases, max_examples=10)


# --- torch's own pass, and ours ---------------------------------------------------------------------------------


def test_torch_s_fuse_is_wrong_on_a_shared_convolution() -> None:
    """What docs/testing.md shows."""
    with pytest.raises(LawError, match=r"breaks a law: evaluation") as found:
        check_pass(fuse, "evaluation", without=("idempotent",), graphs=NORMS, max_examples=400)
    code = str(found.value).split("the smallest graph found:")[1]
    assert code.count("conv_1(") == 2 or code.count("norm_1(") == 2


@pytest.mark.parametrize(
    ("rewrite", "preserves", "without"),
    [
        (pege_fx.passes.name_writes, "function", ()),
        (pege_fx.passes.normalize, "function", ()),
        (pege_fx.passes.infer_ranks, "structure", ()),
        (pege_fx.passes.analyse_signs, "structure", ()),
        (pege_fx.passes.drop_unused, "bits", ("state",)),
        (pege_fx.passes.FoldBatchNorm("keep"), "structure", ()),
        (pege_fx.passes.FoldBatchNorm("freeze"), "evaluation", ()),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_our_own_passes_keep_the_laws(rewrite: Any, preserves: Any, without: tuple[str, ...]) -> None:
    verdict = check_pass(rewrite, preserves, without=without, graphs=GRAPHS, max_examples=20)
    assert "evaluation" in verdict.laws
