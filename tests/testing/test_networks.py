"""Values and networks shrink, print as code and reach every layer; the assertion passes rounding and nothing else."""

import copy
import importlib
import re
import sys
from typing import Any

import pytest
import torch
from hypothesis import assume, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pege_fx import InputError, PackageError, QuantPolicy, QuantSpec, SpecError, testing
from pege_fx.testing import (
    Case,
    Gradients,
    Network,
    TwoInputs,
    as_trained,
    assert_same_function,
    networks,
    policies,
    specs,
    tensors,
)
from pege_fx.testing.layers import BLOCKS, HEADS, JOINS

QUICK = settings(max_examples=200, database=None)
LAYERS = [name for name in testing.layer_names() if name not in HEADS]


# --- strategies ------------------------------------------------------------------------------------------------------


def test_networks_shrink_to_one_plain_convolution() -> None:
    assert repr(find(networks(), lambda case: True, settings=QUICK)) == "Case.of(Network(['conv'], seed=0))"
    flat = find(networks(dims=[3], inputs=[1]), lambda case: case.network.contains("norm"), settings=QUICK)
    assert repr(flat) == "Case.of(Network(['conv', 'norm'], seed=0, dims=3))"
    block = find(networks(), lambda case: case.network.contains("twice"), settings=QUICK)
    assert repr(block) == "Case.of(Network(['conv', ('twice', ['conv'])], seed=0))"


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("others", [None, [], ["norm"]])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_two_inputs_have_gradients_each(join: str, others: Any, dims: int) -> None:
    network = TwoInputs(["conv"], others, join, dims=dims)
    found = Gradients(network)(*network.inputs())
    assert all(value.any() for name, value in found.items() if name.startswith("input"))
    assert len(found) == 2 + len([*network.parameters()])


def test_a_classifier_ends_in_its_classes() -> None:
    network = Network(["conv", "head"], dims=1)
    assert network(*network.inputs()).shape == (3, 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Network(["cnov"]), "no layer is called 'cnov'; closest: conv"),
        (lambda: Network([("twice", ["norm", "relx"])]), "no layer is called 'relx'; closest: relu"),
        (lambda: TwoInputs(["conv"], ["xyz"]), "no layer is called 'xyz'"),
        (lambda: TwoInputs(["conv"], join="divide"), "'divide' joins nothing"),
    ],
)
def test_networks_that_do_not_exist_are_refused(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_layer_computes_and_trains_in_both_modes(name: str, dims: int) -> None:
    layer: Any = (name, ["conv"]) if name in BLOCKS else name
    network = Network(["conv", layer, "conv"], dims=dims)
    for training in (True, False):
        network.train(training)
        (x,) = network.inputs()
        y = network(x)
        assert y.shape == x.shape
        y.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_networks_reach_every_layer() -> None:
    seen: set[str] = set()

    @given(networks())
    @settings(max_examples=150, database=None)
    def look(case: Case) -> None:
        seen.update(name for name in [*LAYERS, *HEADS, *JOINS] if case.network.contains(name))

    look()
    assert seen == {*LAYERS, *HEADS, *JOINS}


@given(networks())
def test_a_network_prints_as_code_that_makes_it_again(case: Case) -> None:
    torch.manual_seed(torch.initial_seed() + 1)  # whatever the state of the generator is
    again = eval(repr(case), {"Case": Case, "Network": Network, "TwoInputs": TwoInputs})
    assert all(torch.equal(x, y) for x, y in zip(case.inputs, again.inputs, strict=True))
    state, other = case.network.state_dict(), again.network.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert_same_function(case.network, again.network, case.inputs, tolerance=0)


def test_a_network_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    network = Network(["conv", "norm", "dropout"])
    assert_same_function(network, network, network.inputs())
    assert torch.equal(torch.get_rng_state(), before)


def test_norms_look_trained_with_gammas_of_every_sign() -> None:
    norm = as_trained(nn.BatchNorm2d(16), seed=1)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert set(norm.weight.sign().tolist()) == {-1.0, 0.0, 1.0}
    assert float(norm.running_mean.std()) > 0
    assert 0.1 <= float(norm.running_var.min()) < float(norm.running_var.max()) <= 3


@given(st.data(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_tensors_are_finite_and_of_the_shape_and_dtype_asked_for(data: st.DataObject, dtype: torch.dtype) -> None:
    x = data.draw(tensors(dtype=dtype, max_side=3))
    assert x.dtype is dtype
    assert 1 <= x.ndim <= 4
    assert max(x.shape) <= 3
    assert bool(x.isfinite().all())
    assert data.draw(tensors((2, 0, 5))).shape == (2, 0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hostile_tensors_reach_every_kind(dtype: torch.dtype) -> None:
    kinds = {
        "NaN": lambda x: x.isnan().any(),
        "infinity": lambda x: x.isinf().any(),
        "denormal": lambda x: ((x != 0) & (x.abs() < torch.finfo(dtype).smallest_normal)).any(),
        "huge": lambda x: x.isfinite().all() and x.abs().max() > 0.5 * torch.finfo(dtype).max,
    }
    for holds in kinds.values():
        find(tensors((64,), dtype, hostile=True), lambda x, holds=holds: bool(holds(x)), settings=QUICK)


def test_tensors_shrink_to_a_zero() -> None:
    assert find(tensors(), lambda x: True, settings=QUICK).tolist() == [0.0]


@given(specs(), st.sampled_from(["weight", "activation"]), st.booleans())
def test_specs_resolve_on_either_kind_of_edge(spec: QuantSpec, kind: Any, non_negative: bool) -> None:
    low, high = spec.resolve(kind, non_negative=non_negative).bounds
    assert low <= 0 < high


def test_specs_take_what_is_fixed_and_refuse_what_is_wrong_at_once() -> None:
    assert find(specs(bits=5, method="pact"), lambda spec: True, settings=QUICK).method == "pact"
    with pytest.raises(SpecError, match="bits=9"):
        specs(bits=9)
    with pytest.raises(TypeError, match="colour"):
        specs(colour=1)


@given(policies())
def test_policies_survive_a_file(policy: QuantPolicy) -> None:
    assert QuantPolicy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize(
    "wrong", [{"max_layers": 0}, {"dims": []}, {"dims": [4]}, {"inputs": []}, {"inputs": [3]}, {"inputs": 1}]
)
def test_networks_refuse_what_is_wrong_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least one layer"):
        networks(**wrong)


# --- the assertion ---------------------------------------------------------------------------------------------------


class Reversed(nn.Module):
    """A network with every channel and position in reverse order, and back: the same sums in another order."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        for name, module in self.network.named_modules():
            if name.startswith("body.") and isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.flip(0, 1)
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                module.weight.data = module.weight.data.flip(*range(module.weight.ndim))
            if getattr(module, "bias", None) is not None:
                module.bias.data = module.bias.data.flip(0)

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(1, x.ndim))
        out: Tensor = self.network(x.flip(dims)).flip(dims)
        return out


MIRRORED = st.lists(st.sampled_from(["conv", "grouped", "depthwise", "linear", "relu", "sigmoid", "max pool"]), max_size=6)


@given(MIRRORED, st.integers(0, 2**16), st.sampled_from([1, 2, 3]))
def test_sums_in_another_order_pass(layers: list[Any], seed: int, dims: int) -> None:
    network = Network(["conv", *layers], seed, dims)
    assert_same_function(network, Reversed(network), network.inputs())


@given(networks())
def test_a_hundred_thousandth_does_not_pass(case: Case) -> None:
    """Every parameter off by 2e-5, 170 units in the last place. Batch statistics may amplify rounding to more than that."""
    network = case.network.eval()
    assume(not network.contains("norm without statistics"))
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 2e-5)
        exact, moved = (copy.deepcopy(n).double()(*(x.double() for x in case.inputs)) for n in (network, other))
    assume(float((exact - moved).abs().max() / exact.abs().max()) > 2e-5)  # a deep one cancels more of it than of rounding
    with pytest.raises(AssertionError, match="differs by"):
        assert_same_function(network, other, case.inputs)


def linear(**changes: Any) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    for name, value in changes.items():
        getattr(layer, name).data.view(-1)[0] = value
    return layer


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def test_zero_demands_equal_bits_and_nan_equals_nan() -> None:
    assert_same_function(linear(), linear(), (X,), tolerance=0)
    assert_same_function(linear(bias=torch.nan), linear(bias=torch.nan), (X,), tolerance=0)
    assert_same_function(linear(bias=torch.inf), linear(bias=torch.inf), (X,))
    one_more = torch.nextafter(linear().bias[0], torch.tensor(torch.inf)).item()
    with pytest.raises(AssertionError, match=r"the output differs .* where 0 is allowed: element \d+ of \(5, 3\)"):
        assert_same_function(linear(), linear(bias=one_more), (X,), tolerance=0)
    assert_same_function(linear(), linear(bias=one_more), (X,))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 7.0])
@pytest.mark.parametrize("tolerance", [None, 0.0, 0.1])
def test_a_wrong_value_fails_at_every_tolerance(wrong: float, tolerance: float | None) -> None:
    with pytest.raises(AssertionError, match="5 of 15 elements differ"):
        assert_same_function(linear(), linear(bias=wrong), (X,), tolerance)


def test_a_tolerance_is_relative_to_the_largest_output() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    x = torch.tensor([1.0, 1000.0])
    assert_same_function(Scaled(1), Scaled(1.01), (x,), tolerance=0.0101)
    with pytest.raises(AssertionError):
        assert_same_function(Scaled(1), Scaled(1.01), (x,), tolerance=0.0099)


class Result(nn.Module):
    """Returns what it was given."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.result


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ({"a": [X, X]}, {"a": [X, X + 1]}, r"the output\['a'\]\[1\] differs"),
        ({"a": X}, {"b": X}, r"are \[\"the output\['b'\]\"\] instead of"),
        ((X, X), (X,), "instead of"),
        (X, X[:1], r"has shape \(1, 4\) instead of \(5, 4\)"),
        (X, X.double(), r"is torch.float64 instead of torch.float32"),
        (torch.arange(3), torch.arange(3) + 1, "differs by 1 where 0 is allowed"),
        (torch.tensor(True), torch.tensor(False), "differs by 1"),
    ],
)
def test_every_output_counts_and_is_named(a: Any, b: Any, words: str) -> None:
    assert_same_function(Result(a), Result(a), ())
    with pytest.raises(AssertionError, match=words):
        assert_same_function(Result(a), Result(b), ())


def test_outputs_without_elements_are_the_same() -> None:
    assert_same_function(Result(X[:0]), Result(X[:0]), ())


def test_keyword_arguments_are_passed_on() -> None:
    assert_same_function(linear(), linear(), (), input=X)


@given(networks())
@settings(max_examples=settings.default.max_examples // 2)
def test_nothing_is_changed(case: Case) -> None:
    network, (x, *_) = case
    state, before = copy.deepcopy(network.state_dict()), x.clone()
    assert_same_function(network, copy.deepcopy(network), case.inputs)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    assert torch.equal(x, before)


@given(networks())
@settings(max_examples=settings.default.max_examples // 2)
def test_gradients_are_those_of_autograd(case: Case) -> None:
    network, inputs = case
    found = Gradients(copy.deepcopy(network).eval())(*inputs)
    for x in inputs:
        x.requires_grad_()
    network.eval()(*inputs).square().sum().backward()
    names = [f"input {number}" for number in range(len(inputs))]
    assert list(found) == [*names, *(name for name, _ in network.named_parameters())]
    assert all(torch.equal(found.pop(name), x.grad) for name, x in zip(names, inputs, strict=True))
    assert all(torch.equal(value, network.get_parameter(name).grad) for name, value in found.items())


def test_nothing_that_can_be_differentiated_has_no_gradients() -> None:
    assert Gradients(Result(torch.tensor(3)))() == {}
    assert not Gradients(Result(torch.tensor(3)))(X)["input 0"].any()


def test_gradients_of_what_is_not_used_are_zero_and_names_choose() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "spare": nn.Linear(2, 2)})
    model.forward = lambda x: {"y": model["used"](x), "n": torch.tensor(3)}  # type: ignore[method-assign]
    found = Gradients(model, ["used.bias", "spare.bias"])(torch.ones(1, 2))
    assert list(found) == ["input 0", "used.bias", "spare.bias"]
    assert not found["spare.bias"].any()
    assert found["used.bias"].any()


@pytest.mark.parametrize(
    ("missing", "error"), [("hypothesis", PackageError), ("pege_fx.testing.laws", ModuleNotFoundError)], ids=str
)
def test_without_hypothesis_the_extra_is_named_and_other_errors_are_their_own(
    missing: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("pege_fx.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    with pytest.raises(error, match=re.escape("pip install 'pege_fx[testing]'") if missing == "hypothesis" else "laws"):
        importlib.import_module("pege_fx.testing")
