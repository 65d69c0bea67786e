"""Additions, concatenations and the like: quantized where a rule names them, with one scale for all inputs where asked."""

import copy
import operator
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import Constant, ModelError, PEGEScheduler, PolicyError, QuantPolicy, QuantSpec, Rule
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.modules.fake_quant import FakeQuant, ScheduleState, Site
from pege_fx.policy.plan import Operation
from pege_fx.testing import Case, assert_same_function, networks, specs

JOINS = ("add", "sub", "mul", "cat", "stack")
METHODS = ("lsq", "pact", "dorefa", "interval", "minmax")


def policy(*functions: Any, spec: Any = "8", shared: bool = True) -> QuantPolicy:
    joins = [Rule(function=name, input=spec, shared_scale=shared) for name in dict.fromkeys(functions)]
    return QuantPolicy((Rule(weight="4", input="4"), *joins))


def functions_of(case: Case) -> list[str]:
    """Which of the operations a network has, as ``explain`` says what a rule would have to name."""
    explained = pege_fx.explain(case.network, QuantPolicy((Rule(weight="4"),)), case.inputs)
    return [name for name in JOINS if any(f'function="{name}"' in seen.reason for seen in explained.other_nodes)]


def joins_of(gm: GraphModule) -> list[Operation]:
    return [op for op in gm.meta["plan"].operations if op.function in JOINS]


def sites_of(gm: GraphModule, operation: Operation) -> list[FakeQuant]:
    """The fake-quants that the operands of an operation read."""
    (node,) = (node for node in gm.graph.nodes if node.name == operation.node)
    reads = [source for source in node.all_input_nodes if source.op == "call_module"]
    found = [gm.get_submodule(str(source.target)) for source in reads]
    return [module for module in found if isinstance(module, FakeQuant)]


class Residual(nn.Module):
    """x + conv(x) >= 0, then beside itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.mix = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.conv(x))
        b = a + x
        out: Tensor = self.mix(torch.cat([a, b], 1))
        return out


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def site(method: str = "lsq", inputs: tuple[str, ...] = ("x", "y"), estimator: str = "pege", bits: int = 4) -> FakeQuant:
    spec = QuantSpec(bits=bits, method=method, estimator=estimator).resolve("activation", non_negative=False)
    named = Site(name="add_inputs_fq", kind="activation", spec=spec, rule="test", inputs=inputs)
    return FakeQuant(named, ScheduleState("default"), seed=0)


def two() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(2)
    return torch.randn(4, 5, 3, generator=made), 3 * torch.randn(4, 5, 3, generator=made)


# --- laws --------------------------------------------------------------------------------------------------------


@given(networks(), specs(granularity="tensor", narrow=False), st.booleans())
@settings(max_examples=settings.default.max_examples // 2)
def test_networks_keep_their_function_train_and_deploy(case: Case, spec: QuantSpec, shared: bool) -> None:
    network, inputs = case
    names = functions_of(case)
    assume(names)
    gm = pege_fx.prepare(network, policy(*names, spec=spec, shared=shared), inputs)
    assert {op.function for op in joins_of(gm)} <= set(names)
    gm(*inputs).sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in gm.parameters())
    gm.eval()
    deployed = pege_fx.convert(gm)
    with torch.no_grad():
        for other in (deployed, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), pickle.loads(pickle.dumps(deployed))):
            assert_same_function(gm, other, inputs, tolerance=0)


@given(networks(), st.booleans())
@settings(max_examples=settings.default.max_examples // 2)
def test_at_p_0_the_function_is_kept(case: Case, shared: bool) -> None:
    network, inputs = case
    names = functions_of(case)
    assume(names)
    zero = Constant(0.0)
    gm = pege_fx.prepare(network, policy(*names, shared=shared), inputs)
    PEGEScheduler(gm, 1, zero, zero, zero)
    assert_same_function(network, gm, inputs, tolerance=None if network.contains("attention") else 0)


@given(networks(), specs(granularity="tensor", narrow=False))
@settings(max_examples=settings.default.max_examples // 2)
def test_inputs_on_one_scale_have_one_grid_that_holds_them_all(case: Case, spec: QuantSpec) -> None:
    network, inputs = case
    names = functions_of(case)
    assume(names)
    gm = pege_fx.prepare(network, policy(*names, spec=spec), inputs)
    for operation in joins_of(gm):
        quantized = [edge for edge in operation.edges if edge.spec is not None]
        found = sites_of(gm, operation)
        if not quantized:
            continue
        assert len(found) == len({edge.source for edge in quantized})
        assert len({*found}) == 1
        assert len({edge.spec for edge in quantized}) == 1
        if len(found) > 1:
            assert all({edge.operand, *edge.shared_with} == {e.operand for e in quantized} for edge in quantized)
    deployed = pege_fx.convert(gm)
    for operation in joins_of(gm):
        (node,) = (node for node in deployed.graph.nodes if node.name == operation.node)
        scales = {source.args[1] for source in node.all_input_nodes if source.target is pege_fx.functional.dequantize}
        assert len(scales) <= 1


@given(networks())
@settings(max_examples=settings.default.max_examples // 2)
def test_nothing_of_that_kind_is_quantized_without_a_rule_that_names_it(case: Case) -> None:
    network, inputs = case
    gm = pege_fx.prepare(network, QuantPolicy((Rule(weight="4", input="4", output="8"),)), inputs)
    assert not joins_of(gm)


def test_a_model_of_such_operations_alone_is_as_before() -> None:
    with pytest.warns(pege_fx.PegeWarning, match="nothing is quantized"):
        gm = pege_fx.prepare(nn.Sequential(Sum()), "W4A4", (V,))
    assert torch.equal(gm(V), V + V)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


# --- one scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_grid_is_that_of_all_inputs_side_by_side(method: str) -> None:
    x, y = two()
    together, joined = site(method), site(method, inputs=())
    together(x, 0, y)
    joined(torch.cat([x, y]))
    for name, value in joined.method.state_dict().items():
        torch.testing.assert_close(together.method.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    observed = site(method)
    observed.observing = True
    observed(x, 0, y)
    observed(y, 1)
    observed.finish_observing()
    for name, value in site_initialised(method, x, y).items():
        torch.testing.assert_close(observed.method.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def site_initialised(method: str, *inputs: Tensor) -> dict[str, Tensor]:
    fq = site(method, inputs=())
    fq.initialize_from(torch.cat(inputs))
    return dict(fq.method.state_dict())


@pytest.mark.parametrize("method", ["lsq", "pact", "interval"])
def test_the_gradient_is_the_sum_over_the_inputs(method: str) -> None:
    x, y = two()
    together = site(method)
    together.initialize_from(x, y)
    (together(x, 0, y).square().sum() + together(y, 1).square().sum()).backward()
    expected: dict[str, Tensor] = {}
    for value in (x, y):
        alone = copy.deepcopy(together)
        alone.zero_grad()
        alone(value).square().sum().backward()
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            expected[name] = expected.get(name, torch.zeros(())) + parameter.grad
    for name, parameter in together.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_moving_range_sees_all_inputs_at_once() -> None:
    x, y = two()
    fq = site("minmax")
    fq.initialize_from(x)
    low, high = fq.method.low.clone(), fq.method.high.clone()
    fq(x, 0, y)
    fq(y, 1)
    both = torch.cat([x, y])
    torch.testing.assert_close(fq.method.low, low + 0.1 * (both.min() - low))
    torch.testing.assert_close(fq.method.high, high + 0.1 * (both.max() - high))


def test_masks_are_independent_by_input_and_the_same_in_a_repeated_forward() -> None:
    fq, x = site(), torch.randn(40_000, generator=torch.Generator().manual_seed(3))
    fq.initialize_from(x)
    fq.schedule.rate.fill_(0.5)
    with eager_kernels():
        first, second, third = (fq(x, number).ne(x) for number in range(3))
        for a, b in ((first, second), (first, third), (second, third)):
            assert abs(float((a == b).float().mean()) - 0.5) < 0.02
        assert torch.equal(fq(x, 1).ne(x), second)
        assert torch.equal(fq(x).ne(x), first)


@pytest.mark.parametrize("number", [0, 1])
def test_on_a_further_rank_each_input_is_its_part_of_the_global_batch(number: int) -> None:
    fq, x = site(), torch.randn(8, 100, generator=torch.Generator().manual_seed(4))
    fq.initialize_from(x)
    fq.schedule.rate.fill_(0.5)
    whole = fq(x, number)
    fq.schedule.rank = 1
    assert torch.equal(fq(x[4:], number), whole[4:])


def test_one_input_that_may_be_negative_makes_all_signed() -> None:
    gm = pege_fx.prepare(Residual(), policy("add", "cat"), (X,))
    add, cat = joins_of(gm)
    assert [edge.spec.signed for edge in add.edges if edge.spec] == [True, True]
    assert [edge.spec.signed for edge in cat.edges if edge.spec] == [True, True]

    class Positive(Residual):
        def forward(self, x: Tensor) -> Tensor:
            a = F.relu(self.conv(x))
            out: Tensor = self.mix(torch.cat([a, F.relu(x)], 1))
            return out

    (cat,) = joins_of(pege_fx.prepare(Positive(), policy("cat"), (X,)))
    assert [edge.spec.signed for edge in cat.edges if edge.spec] == [False, False]
    alone = joins_of(pege_fx.prepare(Residual(), policy("add", shared=False), (X,)))
    assert [edge.spec.signed for edge in alone[0].edges if edge.spec] == [False, True]


def test_what_else_reads_a_value_keeps_a_fake_quant_of_its_own() -> None:
    gm = pege_fx.prepare(Residual(), policy("add", "cat", spec="4"), (X,))
    x = next(node for node in gm.graph.nodes if node.op == "placeholder")
    names = {str(reader.target): str(next(iter(reader.users)).name) for reader in x.users if not reader.args[1:]}
    assert names == {"x_fq": "conv"}
    assert {fq.site.inputs for fq in pege_fx.fake_quants(gm).values()} == {(), ("relu", "x"), ("relu", "add")}


def test_operations_on_the_same_values_share_one_fake_quant() -> None:
    class Both(Residual):
        def forward(self, x: Tensor) -> Tensor:
            a = self.conv(x)
            out: Tensor = self.mix(torch.cat([a + x, x - a], 1))
            return out

    gm = pege_fx.prepare(Both(), policy("add", "sub"), (X,))
    assert sum(bool(fq.site.inputs) for fq in pege_fx.fake_quants(gm).values()) == 1


# --- what is one of these operations -------------------------------------------------------------------------------


def joined(function: Any) -> nn.Module:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return function(self.a(x), self.b(x))

    return Joined()


V = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add", lambda a, b: a + b),
        ("add", torch.add),
        ("add", lambda a, b: torch.add(input=a, other=b, alpha=2)),
        ("add", lambda a, b: a.add(b)),
        ("add", lambda a, b: a.add_(b)),
        ("add", operator.iadd),
        (torch.add, operator.iadd),
        (operator.iadd, operator.add),
        ("iadd", operator.add),
        ("sub", lambda a, b: a - b),
        ("sub", operator.isub),
        ("subtract", torch.sub),
        ("mul", lambda a, b: a * b),
        ("mul", lambda a, b: a.mul_(b)),
        (torch.multiply, operator.mul),
        ("cat", lambda a, b: torch.cat([a, b], dim=-1)),
        ("cat", lambda a, b: torch.cat(tensors=(a, b, a), dim=-1)),
        (torch.concat, lambda a, b: torch.concatenate([a, b])),
        ("stack", lambda a, b: torch.stack([a, b])),
    ],
)
@pytest.mark.parametrize("example", [(V,), None])
def test_every_form_of_an_operation_has_edges(name: Any, function: Any, example: Any) -> None:
    model = joined(function)
    gm = pege_fx.prepare(model, policy(name), example)
    gm(V)  # without an example this calibrates
    (operation,) = (op for op in gm.meta["plan"].operations if not op.weights)
    assert all(edge.spec is not None and edge.spec.bits == 8 for edge in operation.edges)
    assert len(operation.edges) >= 2
    assert all(edge.shared_with for edge in operation.edges)
    gm(V).square().sum().backward()
    gm.eval()
    fq = gm.a if isinstance(gm.a, FakeQuant) else next(s for s in pege_fx.fake_quants(gm).values() if s.site.inputs)
    assert torch.isfinite(next(fq.parameters()).grad).all()  # type: ignore[arg-type]
    assert torch.equal(pege_fx.convert(gm)(V), gm(V))
    zero = Constant(0.0)
    PEGEScheduler(gm.train(), 1, zero, zero, zero)
    torch.testing.assert_close(gm(V), model(V))


def test_in_place_results_are_not_written_into_what_others_read() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(x)
            view = y.view(-1)
            y += x
            return y, view

    with pytest.warns(
        pege_fx.PegeWarning, match=r"nothing is quantized:\n  add: iadd works in place, on memory that something"
    ):
        gm = pege_fx.prepare(InPlace(), QuantPolicy((Rule(function="add", input="2", shared_scale=True),)), (V,))
    assert_same_function(InPlace(), gm, (V,), tolerance=0)


def test_stochastic_depth_before_a_sum_in_place_is_looked_through() -> None:
    model = torchvision.models.efficientnet_b0(num_classes=4).features[2]
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(6))
    gm = pege_fx.prepare(model, policy("add"), (x,))
    assert [[edge.reason for edge in op.edges] for op in joins_of(gm)] == [["", ""]]
    gm(x).sum().backward()
    gm.eval()
    assert torch.equal(pege_fx.convert(gm)(x), gm(x))


def test_a_value_that_is_changed_afterwards_is_left_alone() -> None:
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + b, a.mul_(2)

    model = joined(function)
    gm = pege_fx.prepare(model, policy("add"), (V,))
    (add,) = joins_of(gm)
    assert {edge.reason for edge in add.edges} == {"mul_ changes a in place"}
    sum(y.sum() for y in gm(V)).backward()


def test_an_output_that_is_added_to_in_place_trains() -> None:
    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            y += x
            return y

    gm = pege_fx.prepare(Out(), QuantPolicy((Rule(weight="4", output="4"),)), (V,))
    gm(V).square().sum().backward()
    assert all(node.target is not operator.iadd for node in gm.graph.nodes)


class Sizes(nn.Module):
    """Sums of sizes, of whole numbers, of a number and a tensor; a list from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.embedding = nn.Linear(4, 4), nn.Embedding(9, 4)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        wide = self.fc(x).reshape(x.shape[0] * 1, x.size(1) + 0)
        both = torch.cat(torch.split(wide, 2, 1), 1)
        out: Tensor = wide + self.embedding(i + 1) + both + 1
        return out


@pytest.mark.parametrize("with_example", [True, False])
def test_sizes_are_no_tensors_and_numbers_no_inputs(with_example: bool) -> None:
    inputs = V, torch.tensor([0, 1, 2])
    gm = pege_fx.prepare(Sizes(), policy("add", "mul", "cat"), inputs if with_example else None)
    edges = {op.node: [(e.operand, e.source, e.reason) for e in op.edges] for op in joins_of(gm)}
    reasons = {op.node: op.reason for op in joins_of(gm)}
    listed = [name for name, found in edges.items() if not found]
    assert [reasons[name] for name in listed] == ["its tensors come as one list, which another operation makes"]
    whole = [found for found in edges.values() if found and found[0][1] == "i"]
    assert whole == [[("input", "i", "i is torch.int64" if with_example else "")]]
    plus_one = [found for found in edges.values() if len(found) == 1 and found[0][1] != "i"]
    assert [found[0][2] for found in plus_one] == [""]
    assert not any(op.function == "mul" for op in joins_of(gm))
    if with_example:
        assert gm(*inputs).shape == (3, 4)
    else:
        with pytest.raises(
            ModelError, match=r"i_fq got a torch.int64 tensor, and quantizes floating-point ones[\s\S]*example_in"
        ):
            gm(*inputs)


def test_a_parameter_among_the_inputs_is_an_input() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.positions = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x) + self.positions
            return out

    model = Positions()
    gm = pege_fx.prepare(model, policy("add"), (V,))
    (add,) = joins_of(gm)
    assert [(edge.operand, edge.is_weight, edge.spec is not None) for edge in add.edges] == [
        ("input", False, True),
        ("other", False, True),
    ]
    gm(V).sum().backward()
    assert gm.positions.grad is not None
    gm.eval()
    assert torch.equal(pege_fx.convert(gm)(V), gm(V))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([Rule(input="4", shared_scale=True)], r"asks for one scale for all inputs of conv \(conv2d\), which has one\."),
        ([Rule(function="conv2d", input="4", shared_scale=True)], r"of conv \(conv2d\), which has one"),
        ([Rule(function="add", shared_scale=True)], r"no rule gives the inputs of add a format; set input, too"),
        ([Rule(weight="4", input="4"), Rule(match="add", input="8")], r"only a rule with function='add' is about: give that"),
        ([Rule(function="ad", input="8")], r"decides for none of 2 operations\.[\s\S]*closest functions: add"),
        ([Rule(function="mul", input="8")], r"decides for none of 2 operations\."),
    ],
)
def test_what_makes_no_sense_is_refused(rules: list[Rule], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        pege_fx.explain(Residual(), QuantPolicy(tuple(rules)), (X,))


def test_a_later_rule_takes_one_back() -> None:
    rules = (*policy("add").rules, Rule(function="add", match="add", shared_scale=False))
    (add,) = joins_of(pege_fx.prepare(Residual(), QuantPolicy(rules), (X,)))
    assert [edge.shared_with for edge in add.edges] == [(), ()]
    rules = (*policy("add").rules, Rule(function="add", match="add", input=None))
    (add,) = joins_of(pege_fx.prepare(Residual(), QuantPolicy(rules), (X,)))
    assert [edge.reason for edge in add.edges] == ["float by the policy"] * 2


# --- what reads a prepared model -----------------------------------------------------------------------------------


def test_explain_says_what_shares_a_scale_and_how_to_ask() -> None:
    explained = pege_fx.explain(Residual(), policy("add"), (X,))
    assert "one scale with other by rule 1" in str(explained["add"])
    assert "rule 1; one scale" in str(explained)
    assert 'unless a rule says function="cat"' in str(explained["cat"])
    (add,) = (entry for entry in explained.to_dict()["operations"] if entry["path"] == "add")
    assert [edge["shared_with"] for edge in add["edges"]] == [["other"], ["input"]]
    gm = pege_fx.prepare(Residual(), policy("add"), (X,))
    assert "one scale for relu, x" in str(gm.add_inputs_fq)
    assert "add: add" in str(pege_fx.summary(gm)["add"])
    assert "add" not in {b.node for b in pege_fx.summary(gm).other_nodes}


def test_sharing_is_part_of_the_fingerprint() -> None:
    plans = [pege_fx.explain(Residual(), policy("add", shared=shared), (X,)).plan for shared in (True, False)]
    assert plans[0].fingerprint != plans[1].fingerprint


def test_state_dict_and_checkpoints_hold_it_once(tmp_path: Path) -> None:
    gm = pege_fx.prepare(Residual(), policy("add", "cat"), (X,))
    names = [name for name in gm.state_dict() if "inputs_fq" in name]
    assert names == [f"{at}_inputs_fq.{what}" for at in ("add", "cat") for what in ("calibrated", "method.scale")]
    pege_fx.save(gm, tmp_path / "state.safetensors")
    again = pege_fx.load(tmp_path / "state.safetensors", Residual(), example_inputs=(torch.zeros_like(X),))
    assert_same_function(gm.eval(), again.eval(), (X,), tolerance=0)
    with pytest.raises(pege_fx.CheckpointError, match="another graph or policy"):
        pege_fx.load(tmp_path / "state.safetensors", pege_fx.prepare(Residual(), policy("add", "cat", shared=False), (X,)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_sees_one_graph() -> None:
    gm = pege_fx.prepare(Residual(), policy("add", "cat"), (X,))
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), gm(X))


def test_losses_telemetry_strengths_and_reports_see_every_input() -> None:
    gm = pege_fx.prepare(Residual(), policy("add", spec=QuantSpec(bits=2, estimator="ewgs")), (X,))
    telemetry = pege_fx.Telemetry(gm, every=1)
    gm(X).square().mean().backward(retain_graph=True)
    fq = gm.add_inputs_fq
    seen = fq.last_forward()
    assert seen is None or seen[0].numel() == 2 * X.numel()
    telemetry.step()
    (row,) = (row for row in telemetry.history if row["site"] == "add_inputs_fq")
    assert 0 < row["error"] < 1
    telemetry.close()
    found = pege_fx.update_ewgs(gm, lambda batch: gm(batch).square().mean(), [X], draws=2)
    assert set(found) == {"add_inputs_fq"}
    assert pege_fx.Guard(gm).findings(X) is not None
    assert gm(X).isfinite().all()
    measured = pege_fx.report.__globals__["_measured"](gm, [X])
    assert sum(measured["add_inputs_fq"]["continuous"]) == 2 * X.numel()


def test_the_second_term_of_the_loss_counts_every_input() -> None:
    gm = pege_fx.prepare(Residual(), QuantPolicy((Rule(function="add", input="2", shared_scale=True),)), (X,))
    PEGEScheduler(gm, 1, Constant(1.0), Constant(0.0), Constant(2.0))
    gm(X)
    a = F.relu(gm.conv(X))
    fq = gm.add_inputs_fq
    gm(X)
    expected = sum((value - fq.deployed(value)).square().sum() for value in (a, X))
    y = gm(X)
    torch.testing.assert_close(pege_fx.discretization_loss(gm), expected)
    assert y.requires_grad


def test_bits_for_a_budget_name_the_function() -> None:
    gm = pege_fx.prepare(Residual(), policy("add", spec="4"), (X,))
    found = pege_fx.sensitivity(gm, [X], bits=(2, 8), progress=False)
    assert {"add_inputs_fq"} == {e.site for e in found.effects if "inputs" in e.site}
    suggested = found.suggest(bit_operations=1e9)
    again = pege_fx.prepare(Residual(), suggested, (X,))
    (add,) = joins_of(again)
    assert len({edge.spec.bits for edge in add.edges if edge.spec}) == 1
    assert all(edge.shared_with for edge in add.edges)


def test_the_dataflow_has_an_edge_from_what_is_quantized_alone() -> None:
    gm = pege_fx.prepare(Residual(), policy("add"), (X,))
    graph = pege_fx.to_networkx(gm)
    shared = [key for key, facts in graph.nodes.items() if facts["op"] == "call_module" and "inputs_fq" in facts["target"]]
    assert [len([*graph.predecessors(key)]) for key in shared] == [1, 1]
    assert pege_fx.size_report(gm).quantized_bytes == pege_fx.size_report(pege_fx.convert(gm)).quantized_bytes


@pytest.mark.parametrize("style", ["qdq", "qcdq", "qonnx"])
def test_onnx_has_one_scale_for_both(tmp_path: Path, style: Any) -> None:
    onnx = pytest.importorskip("onnx")
    gm = pege_fx.prepare(Residual().eval(), policy("add", "cat"), (X,))
    deployed = pege_fx.convert(gm)
    pege_fx.export_onnx(deployed, tmp_path / "model.onnx", (X,), style=style)
    assert pege_fx.verify_export(deployed, tmp_path / "model.onnx", [X]).ok
    graph = onnx.load(tmp_path / "model.onnx").graph
    made = {name: node for node in graph.node for name in node.output}
    values = {constant.name: onnx.numpy_helper.to_array(constant) for constant in graph.initializer}
    for kind in ("Add", "Concat"):
        node = next(node for node in graph.node if node.op_type == kind and all(name in made for name in node.input))
        scales = [float(values[made[name].input[1]]) for name in node.input]
        assert len(scales) == 2
        assert scales[0] == scales[1]


def test_graphs_inside_python_and_blocks_share_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Residual()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y if float(y.detach().sum()) < 1e9 else x

    with pytest.warns(pege_fx.PegeWarning, match="stays Python"):
        gm = pege_fx.prepare(Branching(), policy("add"), (X,))
    assert "body.add_inputs_fq" in pege_fx.fake_quants(gm)
    gm(X).sum().backward()
    gm.eval()
    assert torch.equal(pege_fx.convert(gm)(X), gm(X))
    blocks = pege_fx.prepare(nn.Sequential(Residual()), policy("add"), (X,), blocks="0")
    assert "0.add_inputs_fq" in pege_fx.fake_quants(blocks)
