"""y is made again in backward where a rule asks for it: the same gradients, bit for bit, from the bytes of float training."""

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, QuantSpec, Rule, functional
from pege_fx.numerics import recompute
from pege_fx.passes.operators import RECOMPUTING
from pege_fx.testing import policies

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
AGAIN = Rule(recompute=True)


@pytest.fixture(autouse=True)
def _plain_operations() -> Iterator[None]:
    with pege_fx.kernels.eager_kernels():
        yield


class Net(nn.Module):
    """Convolutions that share an input, with live BatchNorms; a linear layer on three dimensions; products of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 6, 3, padding=1), nn.ConvTranspose2d(6, 6, 3, padding=1, groups=2)
        self.linear, self.matrix = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8) / 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = self.left(x) + self.right(x)
        rows = self.linear(x) @ self.matrix.t()
        x = torch.softmax(rows @ x.transpose(-1, -2), -1).mul(x)
        out: Tensor = self.head(torch.einsum("bchw,bchv->bc", x, rows))
        return out


def prepared(again: bool, policy: QuantPolicy | str = "W3A3", rate: float | None = 0.5) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    given = QuantPolicy.parse(policy, first="4", last="4") if isinstance(policy, str) else policy
    gm = pege_fx.prepare(Net(), QuantPolicy((*given.rules, *([AGAIN] if again else []))), (X,))
    if rate is not None:
        PEGEScheduler(gm, 10, Constant(rate), Constant(1e-2), Constant(1e-2))
    return gm.train()


def gradients(model: nn.Module, x: Tensor = X, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    (model if run is None else run)(x).square().sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters and buffers left out."""
    owned = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers(), x]}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        alive = model(x)
    assert alive is not None
    return sum(kept.values())


# --- the same gradients --------------------------------------------------------------------------------------------


@given(policies(), st.sampled_from([0.0, 0.3, 1.0, None]))
def test_gradients_are_the_same_to_the_last_bit(policy: QuantPolicy, rate: float | None) -> None:
    plain, again = prepared(False, policy, rate), prepared(True, policy, rate)
    assert_equal(gradients(again), gradients(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_too(dtype: torch.dtype) -> None:
    plain, again = prepared(False), prepared(True)
    with torch.autocast("cpu", dtype):
        assert_equal(gradients(again), gradients(plain))


def test_channels_last_too() -> None:
    plain, again = (prepared(again).to(memory_format=torch.channels_last) for again in (False, True))  # type: ignore[call-overload]
    x = X.to(memory_format=torch.channels_last)
    assert_equal(gradients(again, x), gradients(plain, x))


def test_copies_and_checkpointed_blocks_too() -> None:
    plain, again = prepared(False), prepared(True)
    wanted = gradients(plain)
    assert_equal(gradients(copy.deepcopy(again)), wanted)
    assert_equal(gradients(pickle.loads(pickle.dumps(again))), wanted)
    assert_equal(gradients(again, run=lambda x: checkpoint(again, x, use_reentrant=False)), wanted)


def test_backward_twice_through_one_graph_and_no_third_time() -> None:
    plain, again = prepared(False), prepared(True)
    found = []
    for model in (plain, again):
        loss = model(X).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("estimator", ["pege", "ste"])
def test_second_derivatives_are_the_same(estimator: str) -> None:
    def second(recompute: bool) -> tuple[Tensor, ...]:
        x = torch.linspace(-2, 2, 12).requires_grad_()
        scale = torch.tensor(0.3, requires_grad=True)
        spec, rate, key = QuantSpec(bits=3, estimator=estimator), torch.tensor(0.5), torch.tensor(5, dtype=torch.int32)
        y = functional.fake_quantize(x, scale, spec, rate=rate, key=key, strength=torch.tensor(0.1), recompute=recompute)
        first = torch.autograd.grad(y.pow(3).sum(), (x, scale), create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1], (x, scale))

    torch.testing.assert_close(second(True), second(False))


def test_the_discretization_loss_is_the_same() -> None:
    losses = []
    for again in (False, True):
        model = prepared(again)
        alive = model(X)
        losses.append(pege_fx.discretization_loss(model))
        assert alive is not None
    assert torch.equal(*losses)


# --- the bytes of float --------------------------------------------------------------------------------------------


class Plain(nn.Sequential):
    """Six convolutions with BatchNorm and ReLU."""

    def __init__(self) -> None:
        layers = [(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6)]
        super().__init__(*(layer for group in layers for layer in group))


@pytest.mark.parametrize("rate", [0.5, None])
def test_bytes_kept_for_backward_are_those_of_float(rate: float | None) -> None:
    x = torch.randn(16, 8, 32, 32)
    found = []
    for rules in ([], [AGAIN]):
        gm = pege_fx.prepare(Plain(), QuantPolicy((Rule(weight="2", input="2"), *rules)), (x,)).train()
        if rate is not None:
            PEGEScheduler(gm, 10, Constant(rate))
        found.append(kept_bytes(gm, x) / kept_bytes(Plain(), x))
    assert 1.4 < found[0] < 1.6
    assert found[1] < 1.01


@pytest.mark.parametrize("again", [False, True])
def test_nobody_holds_y_between_forward_and_backward(again: bool) -> None:
    seen: list[weakref.ref[Tensor]] = []
    model = prepared(again)
    for site in pege_fx.fake_quants(model).values():
        site.register_forward_hook(lambda site, args, y: seen.append(weakref.ref(y)) if site.recompute == again else None)
    loss = model(X).square().sum()
    assert any(y() is not None for y in seen) != again
    loss.backward()


def test_backward_lets_go_of_what_it_made_again() -> None:
    model, nodes = prepared(True), []
    for site in pege_fx.fake_quants(model).values():
        site.register_forward_hook(lambda site, args, y: nodes.append(y.grad_fn) if site.recompute else None)
    model(X).square().sum().backward(retain_graph=True)
    discretizers = [node for node in nodes if getattr(node, "recompute", False)]
    assert discretizers
    assert all(node.remembered is None for node in discretizers)


def test_methods_that_bend_their_input_keep_no_more_than_before() -> None:
    for method in ("pact", "dorefa", "interval", "minmax"):
        policy = QuantPolicy((Rule(weight=QuantSpec(bits=3, method=method), input=QuantSpec(bits=3, method=method)),))
        assert kept_bytes(prepared(True, policy), X) < kept_bytes(prepared(False, policy), X)


# --- compiled ------------------------------------------------------------------------------------------------------


# The compiler of torch 2.11 uses what torch 2.11 deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_keeps_less_and_has_the_same_gradients() -> None:
    torch.compiler.reset()
    found = {}
    for again in (False, True):
        torch.manual_seed(0)
        rules = (Rule(weight="3", input="3"), *([AGAIN] if again else []))
        model = pege_fx.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), QuantPolicy(rules), (X,))
        compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager_decomp_partition")
        found[again] = kept_bytes(compiled, X), gradients(model, run=compiled)
    torch.compiler.reset()
    older = torch.__version__.startswith("2.11.")  # its partitioner keeps as little without being told
    assert found[True][0] < found[False][0] or (older and found[True][0] == found[False][0])
    for name, value in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], value, rtol=1e-4, atol=1e-4)


# --- a policy's field ----------------------------------------------------------------------------------------------


def test_a_rule_says_which_operations() -> None:
    gm = prepared(False, QuantPolicy((Rule(weight="3", input="3"), Rule(match="left", recompute=True))))
    sites = pege_fx.fake_quants(gm)
    assert {name for name, site in sites.items() if site.recompute} == {"left.weight_fq", "relu_fq"}
    called = {node.name: node.target for node in gm.graph.nodes if node.op == "call_function"}
    assert called["left"] is recompute.conv2d
    assert called["right"] is F.conv_transpose2d
    assert "pege_fx_numerics_recompute_conv2d(" in gm.code
    assert "made again in backward" in repr(sites["left.weight_fq"])
    assert_equal(gradients(gm), gradients(prepared(False, QuantPolicy((Rule(weight="3", input="3"),)))))


def test_explain_and_summary_say_it_and_files_keep_it(tmp_path: Any) -> None:
    policy = QuantPolicy((Rule(weight="3", input="3"), AGAIN, Rule(match="head", recompute=False)))
    assert QuantPolicy.from_json(policy.to_json()) == policy
    policy.to_toml(tmp_path / "policy.toml")
    assert QuantPolicy.from_toml(tmp_path / "policy.toml") == policy
    for table in (pege_fx.explain(Net(), policy), pege_fx.summary(prepared(False, policy))):
        assert "weight: 3 bits signed per channel, lsq, pege, made again in backward by rule 0" in str(table["left"])
        assert "made again" not in str(table["head"])


def test_methods_become_functions_and_a_weight_behind_a_transpose_is_kept() -> None:
    gm = prepared(True)
    edges = {(op.path, edge.operand): edge for op in pege_fx.summary(gm).plan.operations for edge in op.edges}
    turned = [edge for (_, operand), edge in edges.items() if edge.source == "matrix"]
    assert [edge.recompute for edge in turned] == [False]
    assert {node.target for node in gm.graph.nodes if node.name in ("matmul", "matmul_1")} == {recompute.matmul}


def test_deployed_graphs_call_torchs_own_operations() -> None:
    plain, again = (pege_fx.convert(prepared(again, rate=None)) for again in (False, True))
    assert "recompute" not in again.code
    assert torch.equal(plain(X), again(X))


@pytest.mark.parametrize("function", sorted(set(RECOMPUTING.values()), key=lambda f: f.__name__))
def test_a_variant_is_found_under_the_name_that_code_uses(function: Callable[..., Any]) -> None:
    assert function.__module__ == "pege_fx.numerics.recompute"
    assert getattr(recompute, function.__name__) is function
