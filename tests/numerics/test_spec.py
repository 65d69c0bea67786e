"""Number formats: the grid of each, what is refused and how, and the layout of a weight's output channels."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pege_fx import Estimator, ForwardMethod, QuantSpec, SpecError
from pege_fx.modules.methods import PACT
from pege_fx.numerics.spec import ESTIMATORS, METHODS, Channels, Registry, bounds_of

METHOD_NAMES = ["lsq", "pact", "dorefa", "interval", "minmax"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_grids_have_as_many_codes_as_their_bits_can_count(bits: int) -> None:
    low, high = bounds_of(bits, signed=True)
    assert (low, high) == (-(1 << bits - 1), (1 << bits - 1) - 1)
    assert high - low + 1 == 2**bits
    assert bounds_of(bits, signed=False) == (0, 2**bits - 1)
    narrow = bounds_of(bits, signed=True, narrow=True)
    assert narrow == (-high, high)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", None, True])
def test_bits_outside_two_to_eight_are_refused(bits: object) -> None:
    with pytest.raises(SpecError, match=r"bits=.* is not a whole number from 2 to 8") as error:
        QuantSpec(bits=bits)  # type: ignore[arg-type]
    assert repr(bits) in str(error.value)
    assert "None in a rule to stay in float" in str(error.value)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="unknown forward method 'lsp'") as error:
        QuantSpec(bits=4, method="lsp")
    for name in METHOD_NAMES:
        assert name in str(error.value)
    assert "closest: lsq" in str(error.value)
    assert "docs/extending.md" in str(error.value)


def test_an_unknown_estimator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="unknown estimator 'pegee'") as error:
        QuantSpec(bits=4, estimator="pegee")
    for name in ("ste", "ewgs", "pege", "pege-relative", "pege-share"):
        assert name in str(error.value)
    assert "closest: pege" in str(error.value)


def test_a_class_that_has_no_name_is_refused_by_its_class_name() -> None:
    with pytest.raises(SpecError, match="unknown forward method 'Linear'"):
        QuantSpec(bits=4, method=torch.nn.Linear)


def test_a_class_stands_for_its_registered_name() -> None:
    assert QuantSpec(bits=4, method=PACT) == QuantSpec(bits=4, method="pact")
    assert QuantSpec(bits=4, method=METHODS["pact"]).method == "pact"
    assert QuantSpec(bits=4, estimator=ESTIMATORS["ewgs"]).estimator == "ewgs"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"granularity": "row"}, r"granularity='row': give \"channel\", \"tensor\", or None"),
        ({"signed": "yes"}, "signed='yes': give True, False, or None"),
        ({"narrow": 1}, "narrow=1: give True or False"),
        ({"narrow": True, "signed": False}, "narrow=True .* does not go with signed=False"),
    ],
)
def test_other_contradictions_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        QuantSpec(bits=4, **wrong)  # type: ignore[arg-type]


def test_a_spec_is_a_value() -> None:
    spec = QuantSpec(bits=4, method="pact")
    assert len({spec, QuantSpec(bits=4, method="pact"), QuantSpec(bits=3, method="pact")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        QuantSpec(4)  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("non_negative", [True, False])
def test_resolve_fills_in_what_was_left_open_and_nothing_else(kind: str, non_negative: bool) -> None:
    found = QuantSpec(bits=4).resolve(kind, non_negative=non_negative)  # type: ignore[arg-type]
    assert found == QuantSpec(bits=4, signed=not non_negative, granularity="channel" if kind == "weight" else "tensor")
    fixed = QuantSpec(bits=5, signed=non_negative, granularity="tensor")
    assert fixed.resolve(kind, non_negative=non_negative) == fixed  # type: ignore[arg-type]


def test_resolve_gives_dorefa_weights_unsigned_codes() -> None:
    assert QuantSpec(bits=2, method="dorefa").resolve("weight", non_negative=False).signed is False
    assert QuantSpec(bits=2, method="dorefa").resolve("activation", non_negative=False).signed is True


@pytest.mark.parametrize(("kind", "method"), [("activation", "lsq"), ("weight", "dorefa")])
def test_narrow_where_the_graph_proves_unsigned_codes_is_the_unsigned_grid(kind: str, method: str) -> None:
    # The user left the sign to the graph: what `narrow` leaves out is not on an unsigned grid.
    found = QuantSpec(bits=4, narrow=True, method=method).resolve(kind, non_negative=True)  # type: ignore[arg-type]
    assert found.bounds == (0, 15)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(bits=4), "4"),
        (QuantSpec(bits=2, estimator="ste"), "2 ste"),
        (QuantSpec(bits=3, method="pact", estimator="ewgs"), "3 pact ewgs"),
    ],
)
def test_a_spec_prints_its_bits_and_what_differs(spec: QuantSpec, text: str) -> None:
    assert str(spec) == text


def test_a_name_belongs_to_one_class_unless_its_cell_runs_again() -> None:
    registry = Registry("thing")
    first = type("First", (), {})
    registry.add("name", first)
    again = type("First", (), {})
    registry.add("name", again)
    assert registry["name"] is again
    with pytest.raises(SpecError, match=r"thing 'name' is already .*First: choose another name"):
        registry.add("name", type("Second", (), {}))


@pytest.mark.parametrize("base", [ForwardMethod, Estimator])
def test_a_subclass_can_not_take_a_name_of_the_library(base: type) -> None:
    taken = "lsq" if base is ForwardMethod else "ste"
    with pytest.raises(SpecError, match=f"'{taken}' is already pege_fx"):
        type("Mine", (base,), {}, name=taken)
    assert QuantSpec(bits=4, method="lsq", estimator="ste").bits == 4


# --- output channels ---------------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Channels]:
    """A weight whose elements are numbered, and where its output channels are."""
    groups, per_in, per_out = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    if draw(st.booleans()):
        shape, channels = (groups * per_out, per_in, *kernel), Channels(groups * per_out)
    else:
        shape, channels = (groups * per_in, per_out, *kernel), Channels(groups * per_out, 1, groups)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape), channels


@given(weights())
def test_rows_and_broadcast_agree_on_the_channel_of_every_element(case: tuple[Tensor, Channels]) -> None:
    weight, channels = case
    rows = channels.rows(weight)
    assert rows.shape == (channels.count, weight.numel() // channels.count)
    channel_of = channels.broadcast(torch.arange(channels.count), tuple(weight.shape)).expand_as(weight)
    for channel in range(channels.count):
        assert set(rows[channel].tolist()) == set(weight[channel_of == channel].tolist())


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_channel_of_a_weight_is_what_its_output_channel_depends_on(groups: int, transposed: bool) -> None:
    torch.manual_seed(0)
    x, per_out = torch.randn(2, 2 * groups, 5, 5), 3
    if transposed:
        weight, channels = torch.randn(2 * groups, per_out, 2, 2), Channels(per_out * groups, 1, groups)
        convolve = F.conv_transpose2d
    else:
        weight, channels = torch.randn(per_out * groups, 2, 2, 2), Channels(per_out * groups)
        convolve = F.conv2d
    for channel in range(channels.count):
        chosen = torch.zeros(channels.count)
        chosen[channel] = 1.0
        y = convolve(x, weight * channels.broadcast(chosen, tuple(weight.shape)), groups=groups)
        assert y.abs().amax((0, 2, 3)).nonzero().flatten().tolist() == [channel]
