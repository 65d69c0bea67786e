"""Sensitivity: one site at a time, the model left as it was; and policies that keep their budget."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import InputError, ModelError, QuantPolicy, Sensitivity, sensitivity
from pege_fx.policy.mixed_precision import Budget, _Allocation

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )


def prepared(policy: str = "W4A4") -> GraphModule:
    return pege_fx.prepare(model(), policy, (X,))


def found(bits: Any = (2, 3, 4, 8), gm: GraphModule | None = None, **options: Any) -> Sensitivity:
    return sensitivity(prepared() if gm is None else gm, [X], bits=bits, progress=False, **options)


def test_one_site_in_float_is_what_taking_its_fake_quant_out_gives() -> None:
    gm = prepared().eval()
    float_model = model().eval()
    with torch.no_grad():
        reference = float_model(X)

    def error(other: nn.Module) -> float:
        with torch.no_grad():
            return float((other(X) - reference).double().square().sum() / reference.double().square().sum())

    result = found(None, gm)
    assert result.baseline == pytest.approx(error(gm), rel=1e-4)
    for effect in result.effects:
        without = copy.deepcopy(gm)
        fq = pege_fx.fake_quants(without)[effect.site]
        if fq.fold is not None:
            continue  # without its fake-quant, a folded weight misses its BatchNorm
        for node in without.graph.find_nodes(op="call_module", target=effect.site):
            node.replace_all_uses_with(node.all_input_nodes[0])
            without.graph.erase_node(node)
        without.recompile()
        assert effect.metric == pytest.approx(error(without), rel=1e-4)


def test_every_site_in_float_is_the_float_model() -> None:
    gm = prepared()
    for site in list(pege_fx.fake_quants(gm)):
        result = found(None, gm, sites=[site])
        assert result.effects[0].change == pytest.approx(result.effects[0].metric - result.baseline)
    # The reference itself, all sites in float, is the float model's output.
    one = sensitivity(gm, [X], lambda output, _: float((output - model().eval()(X)).abs().max()), progress=False)
    assert one.baseline > 0


def test_more_bits_hurt_less_and_the_table_is_ranked() -> None:
    result = found((2, 8))
    by_site: dict[str, dict[int, float]] = {}
    for effect in result.effects:
        by_site.setdefault(effect.site, {})[effect.bits] = effect.metric
    assert all(metrics[8] <= metrics[2] for metrics in by_site.values())
    changes = [abs(effect.change) for effect in result.effects]
    assert changes == sorted(changes, reverse=True)
    assert result.listing.rows[0][1] == result.effects[0].site
    assert "baseline" in str(result)


def test_the_model_is_left_as_it_was() -> None:
    gm = prepared().train()
    before = copy.deepcopy(gm.state_dict())
    specs = {name: fq.site for name, fq in pege_fx.fake_quants(gm).items()}
    found((2, 8), gm)
    found(None, gm)
    after = gm.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name: fq.site for name, fq in pege_fx.fake_quants(gm).items()} == specs
    assert all(module.training for module in gm.modules())
    assert not any("forward" in vars(fq) for fq in pege_fx.fake_quants(gm).values())


def test_an_interrupt_keeps_what_was_measured() -> None:
    calls = 0

    def metric(output: Tensor, _: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return float(output.square().mean())

    result = sensitivity(prepared(), [X], metric, progress=False)
    assert len(result.effects) == 2
    assert not result.complete
    assert "interrupted: 2 of 6 sites" in str(result)
    with pytest.raises(InputError, match="was interrupted"):
        result.suggest(size=1e9)


def test_the_metric_sees_each_batch() -> None:
    batches = [(X[:4], torch.zeros(4)), (X[4:], torch.ones(4))]
    seen = []
    sensitivity(prepared(), batches, lambda out, batch: seen.append(batch[1]) or 0.0, sites=["0.weight_fq"], progress=False)
    assert [float(labels[0]) for labels in seen] == [0.0, 1.0] * 2


def test_plot_shows_the_sites() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    axes = found((2, 8)).plot(most=3)
    assert len(axes.get_yticklabels()) == 3
    axes.figure.clear()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 9}, pege_fx.SpecError, "bits=9 is not a whole number from 2 to 8"),
        ({"sites": ["0.weight"]}, ModelError, "no fake-quant is called '0.weight'; closest: 0.weight_fq"),
        ({"metric": lambda *_: float("nan")}, InputError, "the metric is not a finite number"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sensitivity(prepared(), [X], progress=False, **options)


def test_wrong_batches_are_refused() -> None:
    with pytest.raises(InputError, match="got no batch"):
        sensitivity(prepared(), [])
    with pytest.raises(InputError, match=r"the model fails on inputs \[\(1, 2\)\]"):
        sensitivity(prepared(), [torch.zeros(1, 2)], progress=False)


# --- policies for a budget -------------------------------------------------------------------------------------------


def costs(policy: QuantPolicy) -> tuple[int, int]:
    """Bytes of quantized weights, and bit operations."""
    operations = pege_fx.explain(model(), policy, (X,)).operations
    size = sum((edge.spec.bits * edge.elements + 7) // 8 for operation in operations for edge in operation.weights if edge.spec)
    return size, sum(operation.bit_operations or 0 for operation in operations)


RESULT = found()
LOWEST, HIGHEST = (costs(QuantPolicy.parse(f"W{b}A{b}", first=b, last=b)) for b in (2, 8))


@given(st.floats(0.0, 1.2), st.floats(0.0, 1.2), st.sampled_from(["size", "products", "both"]))
def test_a_suggested_policy_keeps_its_budget_and_round_trips(first: float, second: float, kind: str) -> None:
    size, products = (low + share * (high - low) for low, high, share in zip(LOWEST, HIGHEST, (first, second), strict=True))
    budget = {"size": size if kind != "products" else None, "bit_operations": products if kind != "size" else None}
    policy = RESULT.suggest(**budget)
    used = costs(policy)
    assert budget["size"] is None or used[0] <= budget["size"]
    assert budget["bit_operations"] is None or used[1] <= budget["bit_operations"]
    assert QuantPolicy.from_json(policy.to_json()) == policy


def test_a_large_budget_gives_every_site_its_best_bits() -> None:
    policy = RESULT.suggest(size=1e9)
    best: dict[str, tuple[float, int]] = {name: (0.0, bits) for name, bits in RESULT.bits_now.items()}
    for effect in RESULT.effects:
        best[effect.site] = min(best[effect.site], (effect.change, effect.bits))
    plan = pege_fx.explain(model(), policy, (X,))
    for (path, operand), site in RESULT.readers.items():
        assert plan[path].edge(operand).spec.bits == best[site][1], (path, operand)  # type: ignore[union-attr]


def test_the_costs_are_those_of_the_plan() -> None:
    changes = {site: {bits: 0.0} for site, bits in RESULT.bits_now.items()}
    allocation = _Allocation(RESULT.plan, RESULT.readers, changes, Budget(size=1.0))
    assert allocation.cost() == costs(QuantPolicy.parse("W4A4"))


def test_inputs_of_one_operation_get_the_same_bits() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ self.b(x).transpose(0, 1)

    x = torch.randn(4, 4)
    gm = pege_fx.prepare(Product(), "W4A4", (x,))
    result = sensitivity(gm, [x], bits=(2, 8), progress=False)
    policy = result.suggest(bit_operations=4 * 4 * 4 * (8 * 8 + 8 * 8 + 5 * 5))
    product = pege_fx.explain(Product(), policy, (x,))["matmul"]
    assert len({edge.spec.bits for edge in product.inputs if edge.spec}) == 1


def test_budgets_that_can_not_be_met_are_refused() -> None:
    with pytest.raises(InputError, match="can not be met: with the fewest bits tried, weights take"):
        RESULT.suggest(size=10)
    with pytest.raises(InputError, match="give size in bytes or bit_operations"):
        RESULT.suggest()
    with pytest.raises(InputError, match="give size in bytes or bit_operations"):
        RESULT.suggest(size=-1)
    blind = sensitivity(pege_fx.prepare(model(), "W4A4"), [X], bits=2, progress=False)
    with pytest.raises(InputError, match="bit operations of 0 are not known: prepare with example_inputs"):
        blind.suggest(bit_operations=1e12)
