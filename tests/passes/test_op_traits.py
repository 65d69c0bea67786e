"""The table of traits: each entry is run on tensors, and its claim looked at in memory and values."""

import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, symbolic_trace
from torch.utils._pytree import tree_flatten

from pege_fx.passes import op_traits
from pege_fx.passes.graph import may_write, traits_of
from pege_fx.passes.op_traits import ATTRIBUTES, TRAITS, UNKNOWN, OpTraits, traits_of_target

SQUARE = torch.linspace(0.1, 0.9, 9).view(3, 3)
SIGNAL, IMAGE, VOLUME = torch.rand(2, 4, 8), torch.rand(2, 4, 8, 8), torch.rand(2, 4, 4, 4, 4)
WHOLE, TRUTH, COMPLEX = torch.tensor([[0, 1, 2]] * 3), SQUARE > 0.5, torch.complex(SQUARE, SQUARE)
# What to call a function with, one after the other until it takes one. Its own, where these say nothing or do not fit.
TRIED: list[tuple[Any, ...]] = [
    (SQUARE,), (SQUARE, SQUARE), (SQUARE, 0), (SQUARE, 0, 1), (SQUARE, 0.5), (SQUARE, (3, 3)), (SQUARE, 0, WHOLE), (WHOLE,),
    (WHOLE, WHOLE), (TRUTH,), (SQUARE, SQUARE, SQUARE), (SQUARE, TRUTH, 0.5), ([SQUARE, SQUARE],), (IMAGE,), (IMAGE, 2), (3,),
    ((3, 3),), (SQUARE, 0, WHOLE[0], SQUARE), (SQUARE, 0, WHOLE, SQUARE), (COMPLEX,), (SQUARE, SQUARE[0]), (SQUARE, 1, 3),
    (SQUARE[0], SQUARE[0]), (VOLUME, 2), (SIGNAL, 2), (1, 3), (SQUARE, WHOLE), (SQUARE, 3, 0, 1), (), (3.0,), (3.0, 2.0),
]  # fmt: skip
OWN: dict[str, list[tuple[Any, ...]]] = {
    "addbmm": [(SQUARE, SIGNAL[:, :3, :3], SIGNAL[:, :3, :3])],
    "baddbmm": [(SIGNAL[:, :3, :3], SIGNAL[:, :3, :3], SIGNAL[:, :3, :3])],
    "addmv": [(SQUARE[0], SQUARE, SQUARE[0])],
    "addr": [(SQUARE, SQUARE[0], SQUARE[0])],
    "feature_dropout": [(IMAGE, 0.5, True), (IMAGE, 0.5, False)],
    "lp_pool1d": [(SIGNAL, 2.0, 2)],
    "lp_pool2d": [(IMAGE, 2.0, 2)],
    "affine_grid": [(torch.rand(2, 2, 3), (2, 1, 4, 4))],
    "grid_sample": [(IMAGE, torch.rand(2, 4, 4, 2))],
    "bilinear": [(SQUARE, SQUARE, torch.rand(2, 3, 3))],
    "bmm": [(SIGNAL, SIGNAL.mT)],
    "bucketize": [(SQUARE, SQUARE[0])],
    "conv1d": [(SIGNAL, torch.rand(3, 4, 3))],
    "conv2d": [(IMAGE, torch.rand(3, 4, 3, 3))],
    "conv3d": [(VOLUME, torch.rand(3, 4, 3, 3, 3))],
    "conv_transpose1d": [(SIGNAL, torch.rand(4, 3, 3))],
    "conv_transpose2d": [(IMAGE, torch.rand(4, 3, 3, 3))],
    "conv_transpose3d": [(VOLUME, torch.rand(4, 3, 3, 3, 3))],
    "batch_norm": [
        (IMAGE, torch.zeros(4), torch.ones(4)),
        (IMAGE, None, None, torch.zeros(4), torch.ones(4), False, 0.1, 1e-5, True),
    ],
    "instance_norm": [(IMAGE,), (IMAGE, None, None, None, None, True, 0.1, 1e-5, True)],
    "group_norm": [(IMAGE, 2)],
    "layer_norm": [(SQUARE, (3,))],
    "rms_norm": [(SQUARE, (3,))],
    "prelu": [(SQUARE, torch.tensor([0.5]))],
    "embedding": [(WHOLE, SQUARE), (SQUARE, WHOLE)],
    "embedding_bag": [(WHOLE, SQUARE), (SQUARE, WHOLE[0], WHOLE[0])],
    "einsum": [("ij,jk->ik", SQUARE, SQUARE)],
    "fold": [(torch.rand(2, 16, 9), (4, 4), 2)],
    "index_put": [(SQUARE, (WHOLE[0],), torch.tensor(1.0))],
    "linspace": [(0, 1, 3)],
    "logspace": [(0, 1, 3)],
    "lerp": [(SQUARE, SQUARE, 0.5)],
    "kthvalue": [(SQUARE, 2)],
    "cross_entropy": [(SQUARE, WHOLE[0])],
    "nll_loss": [(SQUARE, WHOLE[0])],
    "normal": [(SQUARE, SQUARE)],
    "randint": [(3, (2, 2))],
    "randint_like": [(SQUARE, 3)],
    "scatter_reduce": [(SQUARE, 0, WHOLE, SQUARE, "sum")],
    "masked_scatter": [(SQUARE, TRUTH, SQUARE)],
    "view_as_complex": [(torch.rand(3, 2),)],
    "logdet": [(SQUARE + 3 * torch.eye(3),)],
    "inverse": [(SQUARE + 3 * torch.eye(3),)],
    "where": [(TRUTH, SQUARE, SQUARE)],
    "as_strided": [(SQUARE, (2, 2), (3, 1))],
    "view": [(SQUARE, 9)],
    "unflatten": [(SQUARE, 0, (3, 1))],
    "dsplit": [(VOLUME, 2)],
    "interpolate": [(IMAGE, 4)],
    "scaled_dot_product_attention": [(SIGNAL, SIGNAL, SIGNAL)],
    "local_response_norm": [(IMAGE, 2)],
    "threshold": [(SQUARE, 0.5, 0.0)],
    "pad": [(SQUARE, (1, 1))],
    "item": [(torch.tensor(1.0),)],
    "new_full": [(SQUARE, (3, 3), 1.0)],
    "full": [((3, 3), 1.0)],
    "full_like": [(SQUARE, 1.0)],
    "fill": [(SQUARE, 1.0)],
    "select_scatter": [(SQUARE, SQUARE[0], 0, 0)],
    "slice_scatter": [(SQUARE, SQUARE)],
    "tensor_split": [(SQUARE, 3)],
    "bincount": [(WHOLE[0],)],
    "flip": [(SQUARE, (0,))],
    "index_fill": [(SQUARE, 0, WHOLE[0], 1.0)],
    "index_select": [(SQUARE, 0, WHOLE[0])],
    "masked_select": [(SQUARE, TRUTH)],
    "multinomial": [(SQUARE, 2)],
    "narrow": [(SQUARE, 0, 0, 2)],
    "permute": [(SQUARE, (1, 0))],
    "split_with_sizes": [(SQUARE, (1, 2))],
    "unfold": [(SQUARE, 0, 2, 1)],
    **{key: [(SQUARE, 0.5, True), (SQUARE, 0.5, False)] for key in ("dropout", "alpha_dropout", "feature_alpha_dropout")},
}
SKIPPED = {"grouped_mm", "cuda"}  # ask for a processor that has them


def functions() -> Iterator[tuple[str, Callable[..., Any], OpTraits]]:
    """The functions and methods of torch and of Python in the table, each by a name of its own."""
    for target, traits in TRAITS.items():
        if isinstance(target, str) and callable(getattr(Tensor, target, None)):
            yield f"Tensor.{target}", getattr(Tensor, target), traits
        elif callable(target) and not isinstance(target, type) and target.__module__ != "math":
            module = (target.__module__ or "torch").split(".")[0]
            if module in ("torch", "_operator") and target is not operator.getitem:
                yield f"{target.__module__}.{target.__name__}", target, traits


CASES = [case for case in functions() if case[0].rpartition(".")[2] not in SKIPPED]


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def memory(values: Iterable[Tensor]) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in values if value.numel()}


def _place_of_inplace(function: Callable[..., Any]) -> int:
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:
        return len(OWN)
    return names.index("inplace") if "inplace" in names else len(OWN)


def called(name: str, function: Callable[..., Any]) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], Any]]:
    """Every call that a function takes: copies of the arguments from before, the arguments, the result."""
    for args in itertools.chain(OWN.get(name.rpartition(".")[2], ()), TRIED):
        if len(args) > _place_of_inplace(function):
            continue
        copied, given = ([x.clone() if isinstance(x, Tensor) else x for x in args] for _ in range(2))
        given = [[x.clone() for x in part] if isinstance(part, list) and tensors(part) else part for part in given]
        try:
            with torch.no_grad():
                result = function(*given)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            NotImplementedError,
            AssertionError,
            AttributeError,
            KeyError,
            ArithmeticError,
        ):
            continue
        yield tuple(copied), tuple(given), result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "function", "traits"), CASES, ids=[case[0] for case in CASES])
def test_what_the_table_says_of_a_function_holds_in_every_call(
    name: str, function: Callable[..., Any], traits: OpTraits
) -> None:
    torch.manual_seed(0)
    count = 0
    for before, given, result in called(name, function):
        count += 1
        if not traits.writes:
            for old, new in zip(tensors(before), tensors(given), strict=False):
                torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
        shared = memory(tensors(result)) & memory(tensors(given))
        if traits.view is False:
            assert not shared
        if traits.view is True:
            assert memory(tensors(result)) <= memory(tensors(given)[:1])
    assert count, "no arguments were found that it takes"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "function", "traits"), CASES, ids=[case[0] for case in CASES])
def test_what_the_table_says_of_values_holds_in_every_call(name: str, function: Callable[..., Any], traits: OpTraits) -> None:
    torch.manual_seed(0)
    for before, _, result in called(name, function):
        (first, *_), results = tensors(before) or [None], tensors(result)
        if traits.keeps_rank and isinstance(first, Tensor) and isinstance(result, Tensor):
            assert result.ndim == first.ndim
        if not traits.random:
            torch.manual_seed(1)  # what draws nothing does not see it
            again = tensors(function(*[x.clone() if isinstance(x, Tensor) else x for x in before]))
            for old, new in zip(results, again, strict=True):
                torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
        if not traits.reads_data:
            negated = [-x if isinstance(x, Tensor) and not torch.equal(x, x.bool()) else x for x in before]
            assert function(*negated) == result
        if traits.joins:
            parts = sorted(torch.cat([x.flatten() for x in tensors(before)]).tolist())
            assert sorted(result.flatten().tolist()) == parts
        if traits.transposes and isinstance(first, Tensor) and len(before) > 1:
            assert torch.equal(result, first.transpose(*before[1:]))


@pytest.mark.parametrize(
    "function", [t for t, traits in TRAITS.items() if traits.identity_in_eval and not isinstance(t, (type, str))]
)
def test_a_function_that_drops_returns_its_input_in_evaluation(function: Callable[..., Any]) -> None:
    for x in (SIGNAL, IMAGE, VOLUME):
        if function in (F.dropout1d, F.dropout2d, F.dropout3d) and x.ndim != int(function.__name__[-2]) + 2:
            continue
        assert torch.equal(function(x, 0.5, False), x)


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if hasattr(SQUARE, name)])  # newer torch has no names
def test_what_the_table_says_of_an_attribute(name: str) -> None:
    x = torch.rand(3, 4)
    found, traits = getattr(x, name), ATTRIBUTES[name]
    if not traits.reads_data:
        assert getattr(-x, name) == found
    if traits.transposes:
        assert torch.equal(found, x.transpose(0, 1))
        assert memory([found]) == memory([x])


def test_an_operation_has_one_entry() -> None:
    with pytest.raises(AssertionError, match="relu"):
        op_traits._state(UNKNOWN, "relu")
    assert traits_of_target("relu") != UNKNOWN


@pytest.mark.parametrize(
    ("in_place", "known"),
    [
        (torch.relu_, F.relu),
        ("relu_", "relu"),
        (operator.iadd, operator.add),
        ("clamp_", "clamp"),
        ("mul_", "mul"),
        ("t_", "t"),
    ],
)
def test_an_operation_in_place_has_the_values_of_the_other_and_a_memory_of_which_nothing_is_known(
    in_place: Any, known: Any
) -> None:
    traits, other = traits_of_target(in_place), traits_of_target(known)
    assert (traits.keeps_sign, traits.non_negative, traits.keeps_rank) == (
        other.keeps_sign,
        other.non_negative,
        other.keeps_rank,
    )
    assert (traits.view, traits.writes) == (None, True)


def test_what_only_looks_like_an_operation_in_place_is_unknown() -> None:
    def add_(x: Tensor) -> Tensor:
        return x

    assert traits_of_target(add_) == traits_of_target("fill_") == traits_of_target("__add__") == UNKNOWN
    assert traits_of_target([]) == UNKNOWN


def test_no_entry_says_that_an_operation_writes() -> None:
    """Whoever writes is found by its name, by ``inplace`` or ``out``, or because the table does not know it."""
    assert not any(traits.writes for traits in TRAITS.values())
    assert OpTraits(view=None, writes=True, identity_in_eval=False) == UNKNOWN


@pytest.mark.parametrize(
    "cls", [target for target, traits in TRAITS.items() if isinstance(target, type) and traits.identity_in_eval]
)
def test_what_drops_returns_its_input_in_evaluation(cls: type[nn.Module]) -> None:
    x = {nn.Dropout2d: IMAGE, nn.Dropout3d: VOLUME}.get(cls, SIGNAL)
    assert torch.equal(cls().eval()(x), x)


class Unknown(nn.ReLU):
    """A subclass is not what its base is."""


def test_a_subclass_a_hook_or_a_patched_forward_makes_a_module_unknown() -> None:
    model = nn.Sequential(nn.ReLU(), Unknown(), nn.ReLU(), nn.ReLU())
    model[2].register_forward_hook(lambda module, args, y: y)
    model[3].forward = torch.relu_  # type: ignore[method-assign]
    graph = Graph()
    x = graph.placeholder("x")
    known = [traits_of(model, graph.call_module(str(i), (x,))) for i in range(4)]
    assert [traits == UNKNOWN for traits in known] == [False, True, True, True]


def fill(x: Tensor) -> None:
    x.fill_(0.0)


torch.fx.wrap("fill")


class CallsOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        fill(x)
        return torch.relu(x)


def test_what_the_table_does_not_know_may_write_unless_the_example_showed_otherwise() -> None:
    gm = symbolic_trace(CallsOut())
    (unknown,) = gm.graph.find_nodes(op="call_function", target=fill)
    assert may_write(gm, unknown)
    unknown.meta["writes"] = []
    assert not may_write(gm, unknown)
    assert not any(may_write(gm, node) for node in gm.graph.nodes)
