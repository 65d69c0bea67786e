"""Property-based testing of graph rewrites: Hypothesis strategies for tensors, formats, policies and networks.

Needs the extra ``test``. Strategies shrink (a network to one plain convolution) and print as code that makes them again.

>>> from hypothesis import given
>>> @given(networks())
... def test_my_pass_keeps_the_function(case):
...     network, inputs = case
...     assert_same_function(network, my_pass(network), inputs)
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from pege_fx.batch_norm import BatchNorm
from pege_fx.policy import QuantPolicy, Rule
from pege_fx.spec import MAX_BITS, MIN_BITS, QuantSpec

__all__ = ["Case", "Gradients", "Network", "as_trained", "assert_same_function", "networks", "policies", "specs", "tensors"]

# --- tensors, formats, policies --------------------------------------------------------------------------------

_FILLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "ties": lambda x: (x * 8).round() / 2,  # halfway between the codes of a grid of step 1
    "normal": lambda x: x,
    "small": lambda x: x * 1e-3,
    "large": lambda x: x * 1e3,
}


@st.composite
def tensors(
    draw: st.DrawFn, shape: Sequence[int] | None = None, dtype: torch.dtype = torch.float32, max_side: int = 6
) -> Tensor:
    """Finite tensors of a given shape, or of one to four dimensions: all zeros, all ones, ties, random at three sizes."""
    if shape is None:
        shape = draw(st.lists(st.integers(1, max_side), min_size=1, max_size=4))
    filling = draw(st.sampled_from(sorted(_FILLINGS, key=list(_FILLINGS).index)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return _FILLINGS[filling](torch.randn(tuple(shape), generator=generator)).to(dtype)


def specs(**fixed: Any) -> st.SearchStrategy[QuantSpec]:
    """Number formats over every field; ``specs(method="lsq", granularity="tensor")`` takes those as they are.

    Raises:
        SpecError, TypeError: if a fixed field does not exist or has a wrong value, at once.
    """
    QuantSpec(**{"bits": MAX_BITS} | fixed)
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "bits": st.integers(MIN_BITS, MAX_BITS),
        "signed": st.sampled_from([None, True, False]),
        "granularity": st.sampled_from(["channel", "tensor"]),
        "narrow": st.booleans(),
        "method": st.sampled_from(["lsq", "pact", "dorefa", "interval", "minmax"]),
        "estimator": st.sampled_from(["pege", "ste", "ewgs", "pege-relative"]),
    }
    fields = st.fixed_dictionaries(drawn | {name: st.just(value) for name, value in fixed.items()})
    return fields.filter(lambda f: not (f["narrow"] and f["signed"] is False)).map(lambda f: QuantSpec(**f))


@st.composite
def policies(draw: st.DrawFn, /, **fixed: Any) -> QuantPolicy:
    """A default rule, and sometimes float or eight bits for the first and the last operation; ``fixed`` as for ``specs``."""
    weight = draw(specs(**fixed))
    activation = draw(specs(**fixed | {"granularity": "tensor"}))
    rules = [Rule(weight=weight, input=draw(st.sampled_from([activation, None])))]
    for role in ("first", "last"):
        if (setting := draw(st.sampled_from(["leave", "8", None]))) != "leave":
            rules.append(Rule(role=role, weight=setting, input=setting))
    return QuantPolicy(tuple(rules))


# --- layers of a network: four channels in, four channels out, the same size ------------------------------------

CHANNELS = 4
_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MAX_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEAN_POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_FUNCTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Functional(nn.Module):
    """A convolution by its function; with ``scaled``, its weight is computed."""

    def __init__(self, dims: int, scaled: bool) -> None:
        super().__init__()
        self.dims, self.scaled = dims, scaled
        self.weight = nn.Parameter(0.3 * torch.randn(CHANNELS, CHANNELS, *[3] * dims))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 0.5 if self.scaled else self.weight
        out: Tensor = _FUNCTIONS[self.dims](x, weight, padding=1)
        return out


class Mixed(nn.Module):
    """A linear layer over the channels of every position."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.movedim(1, -1)).movedim(-1, 1)
        return out


class Gate(nn.Module):
    """Channels weighed by what a linear layer with BatchNorm makes of their means."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims, self.fc, self.bn = dims, nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        means = torch.flatten(x, 2).mean(2)
        weights = torch.sigmoid(self.bn(self.fc(means)))
        return x * weights.reshape(-1, CHANNELS, *[1] * self.dims)


class InPlace(nn.Module):
    """Methods and a module in place, whose results nobody uses; torch's own tracer follows them too."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x + 0.5
        y.add_(x)
        y.mul_(0.5)
        self.relu(y)
        return y


class FunctionalDropout(nn.Module):
    """Dropout that asks for the mode itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=self.training)


# The first of each shrinks best.
_WEIGHTED: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda dims: _CONVS[dims](CHANNELS, CHANNELS, 3, padding=1),
    "conv without bias": lambda dims: _CONVS[dims](CHANNELS, CHANNELS, 3, padding=1, bias=False),
    "grouped": lambda dims: _CONVS[dims](CHANNELS, CHANNELS, 3, padding=1, groups=2),
    "depthwise": lambda dims: _CONVS[dims](CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
    "transposed": lambda dims: _TRANSPOSED[dims](CHANNELS, CHANNELS, 3, padding=1),
    "transposed grouped": lambda dims: _TRANSPOSED[dims](CHANNELS, CHANNELS, 3, padding=1, groups=2),
    "functional": lambda dims: Functional(dims, scaled=False),
    "functional scaled": lambda dims: Functional(dims, scaled=True),
    "linear": lambda dims: Mixed(),
    "gate": Gate,
}
_UNWEIGHTED: dict[str, Callable[[int], nn.Module]] = {
    "norm": lambda dims: _NORMS[dims](CHANNELS),
    "norm without affine": lambda dims: _NORMS[dims](CHANNELS, affine=False),
    "norm without statistics": lambda dims: _NORMS[dims](CHANNELS, track_running_stats=False),
    "relu": lambda dims: nn.ReLU(),
    "sigmoid": lambda dims: nn.Sigmoid(),
    "max pool": lambda dims: _MAX_POOLS[dims](3, 1, 1),
    "mean pool": lambda dims: _MEAN_POOLS[dims](3, 1, 1),
    "dropout": lambda dims: nn.Dropout(0.5),
    "functional dropout": lambda dims: FunctionalDropout(),
    "in place": lambda dims: InPlace(),
}


class Residual(nn.Module):
    """body(x) + x."""

    def __init__(self, body: nn.Module, dims: int) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out + x


class Concatenation(nn.Module):
    """Two branches side by side, mixed by a grouped convolution."""

    def __init__(self, body: nn.Module, dims: int) -> None:
        super().__init__()
        self.body, self.other = body, _CONVS[dims](CHANNELS, CHANNELS, 1)
        self.mix = _CONVS[dims](2 * CHANNELS, CHANNELS, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mix(torch.cat([self.body(x), self.other(x)], 1))
        return out


class Twice(nn.Module):
    """The same modules, called twice."""

    def __init__(self, body: nn.Module, dims: int) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(torch.relu(self.body(x)))
        return out


class SharedInput(nn.Module):
    """A convolution whose output has two readers, one of them the body."""

    def __init__(self, body: nn.Module, dims: int) -> None:
        super().__init__()
        self.conv, self.body = _CONVS[dims](CHANNELS, CHANNELS, 1), body

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.body(y) * torch.sigmoid(y)
        return out


_BLOCKS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "residual": Residual,
    "concat": Concatenation,
    "twice": Twice,
    "shared input": SharedInput,
}

Layer: TypeAlias = "str | tuple[str, list[Any]]"  # a name, or a block's name and its layers


def _made(layer: Layer, dims: int) -> nn.Module:
    if isinstance(layer, str):
        return (_WEIGHTED | _UNWEIGHTED)[layer](dims)
    name, layers = layer
    return _BLOCKS[name](nn.Sequential(*(_made(inner, dims) for inner in layers)), dims)


# --- networks ---------------------------------------------------------------------------------------------------


def as_trained(model: nn.Module, seed: int) -> nn.Module:
    """Give every BatchNorm running statistics and affine parameters as after training, in place; returns the model.

    Gammas of either sign, and one of zero, are among them.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, BatchNorm):
            continue
        with torch.no_grad():
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.1, 3.0, generator=generator)
            if module.affine:
                module.weight.normal_(generator=generator)
                module.weight[0] = 0.0
                module.bias.normal_(generator=generator)
    return model


class Network(nn.Module):
    """A small network from the names of its layers; parameters and BatchNorm statistics come from the seed.

    Args:
        layers: a name each, or a pair of a block's name and the layers inside it.
        seed: of parameters, statistics and inputs.
        dims: of its convolutions, 1 to 3.

    >>> Network(["conv", ("residual", ["norm", "relu"])], seed=3)
    Network(['conv', ('residual', ['norm', 'relu'])], seed=3)
    """

    def __init__(self, layers: list[Layer], seed: int = 0, dims: int = 2) -> None:
        super().__init__()
        self.layers, self.seed, self.dims = layers, seed, dims
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(*(_made(layer, dims) for layer in layers))
        as_trained(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Return example inputs: a batch of three."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        side = {1: 9, 2: 6, 3: 4}[self.dims]
        return (torch.randn(3, CHANNELS, *[side] * self.dims, generator=generator),)

    def contains(self, *names: str) -> bool:
        """Tell whether any layer, also inside a block, has one of these names."""
        return any(name in names for name in _names(self.layers))

    def __repr__(self) -> str:
        return f"Network({self.layers!r}, seed={self.seed}{'' if self.dims == 2 else f', dims={self.dims}'})"


def _names(layers: list[Layer]) -> Iterator[str]:
    for layer in layers:
        if isinstance(layer, str):
            yield layer
        else:
            yield layer[0]
            yield from _names(layer[1])


class Case(NamedTuple):
    """A network and inputs for it."""

    network: Network
    inputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, network: Network) -> "Case":
        return cls(network, network.inputs())

    def __repr__(self) -> str:
        return f"Case.of({self.network!r})"


def networks(max_layers: int = 5, dims: Sequence[int] = (2, 1, 3)) -> st.SearchStrategy[Case]:
    """A small network and inputs for it; it begins with a layer that has a weight.

    Convolutions (plain, grouped, depthwise, transposed, functional, with a computed weight), linear layers, BatchNorms of
    every kind, activations, pools, dropouts and in-place operations, in residual, concatenating, shared and forked blocks.

    Args:
        max_layers: at most so many layers, a block counting as one.
        dims: which convolutions, those of one, two or three dimensions; the first shrinks best.

    Raises:
        ValueError: for anything else, at once.
    """
    if max_layers < 1 or not dims or not set(dims) <= set(_CONVS):
        raise ValueError(f"max_layers={max_layers!r}, dims={dims!r}: give at least one layer, and dimensions from 1 to 3.")
    return _cases(max_layers, list(dims))


@st.composite
def _cases(draw: st.DrawFn, max_layers: int, dims: list[int]) -> Case:
    simple = st.sampled_from([*_WEIGHTED, *_UNWEIGHTED])
    blocks = st.tuples(st.sampled_from([*_BLOCKS]), st.lists(simple, min_size=1, max_size=3))
    first = draw(st.sampled_from([*_WEIGHTED]))
    rest = draw(st.lists(st.one_of(simple, blocks), max_size=max_layers - 1))
    return Case.of(Network([first, *rest], draw(st.integers(0, 2**16)), draw(st.sampled_from(dims))))


class Gradients(nn.Module):
    """The gradients of a module as a function of its inputs: of the sum of its squared outputs, by parameter name.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> list(Gradients(model)(torch.ones(1, 2)))
    ['input 0', 'weight']

    Args:
        module: returns tensors, or tuples, lists and mappings of them.
        names: of the parameters to look at; default: all.
    """

    def __init__(self, module: nn.Module, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.module = module
        self.names = [name for name, _ in module.named_parameters()] if names is None else list(names)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        inputs = {f"input {i}": x.detach().requires_grad_() for i, x in enumerate(args) if _is_float(x)}
        outputs = self.module(*(inputs.get(f"input {i}", x) for i, x in enumerate(args)), **kwargs)
        loss = torch.stack([y.square().sum() for _, y in _flat("", outputs) if y.requires_grad]).sum()
        wanted = inputs | {name: self.module.get_parameter(name) for name in self.names}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(wanted, found, strict=True))


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


# --- one assertion ----------------------------------------------------------------------------------------------

_DRAWS = 4


def assert_same_function(
    a: nn.Module, b: nn.Module, inputs: Sequence[Any], tolerance: float | None = None, **kwargs: Any
) -> None:
    """Assert that two modules compute the same, in their present modes. Neither is changed: copies run, equally seeded.

    Without a ``tolerance``, ``b`` may differ from ``a`` by rounding alone: by as much as ``a`` itself moves when each of
    its parameters, buffers and inputs moves by one unit in the last place, times sqrt(N). Every rounding error of a sum
    of products is such a move (its backward error); N, the longest sum times the number of layers, is how many of them
    there are, and the square root how much less N random moves do than N in the same direction. A model that rounds
    (a prepared one) jumps where a tie flips: such models should agree bit for bit, or be compared before rounding.

    Args:
        a, b: modules that return tensors, or tuples, lists and mappings of them.
        inputs: positional arguments; keyword arguments follow by name.
        tolerance: largest difference relative to the largest output; 0 demands equal bits, and takes NaN as equal to NaN.

    Raises:
        AssertionError: says which output differs, where and by how much.
    """
    expected, found = _outputs(a, inputs, kwargs), _outputs(b, inputs, kwargs)
    assert list(expected) == list(found), f"the outputs are {list(found)} instead of {list(expected)}"
    allowed = _rounding(a, inputs, kwargs, expected) if tolerance is None else {}
    for name, x in expected.items():
        y = found[name]
        assert x.shape == y.shape, f"{name} has shape {tuple(y.shape)} instead of {tuple(x.shape)}"
        assert x.dtype == y.dtype, f"{name} is {y.dtype} instead of {x.dtype}"
        if x.numel() == 0:
            continue
        difference = _difference(x, y)
        bound = allowed[name] if tolerance is None else tolerance * _largest(x)
        worst = int(difference.argmax())
        assert float(difference.flatten()[worst]) <= bound, (
            f"{name} differs by {float(difference.max()):.3g} where {bound:.3g} is allowed: element {worst} of "
            f"{tuple(x.shape)} is {float(y.flatten()[worst]):.9g} instead of {float(x.flatten()[worst]):.9g}; "
            f"{int((difference > bound).sum())} of {x.numel()} elements differ by more."
        )


def _outputs(module: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    module, (args, named) = copy.deepcopy(module), copy.deepcopy((tuple(inputs), dict(kwargs)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = module(*args, **named)
    return {name: value.detach() for name, value in _flat("the output", result)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of nested tuples, lists and mappings, with where it is."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}[{key!r}]", inner)
    elif isinstance(value, (tuple, list)):
        for number, inner in enumerate(value):
            yield from _flat(f"{name}[{number}]", inner)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|; 0 where both are the same infinity or NaN, infinite where only one is not finite."""
    same = (x == y) | (x.isnan() & y.isnan())
    return torch.where(same, 0.0, (x.double() - y.double()).abs().nan_to_num(math.inf, math.inf))


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _rounding(
    module: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return how far rounding may move each output, see ``assert_same_function``."""
    spread = dict.fromkeys(expected, 0.0)
    for seed in range(_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        moved, arguments = copy.deepcopy(module), copy.deepcopy((tuple(inputs), dict(kwargs)))
        with torch.no_grad():
            for value in [*moved.parameters(), *moved.buffers(), *(tensor for _, tensor in _flat("", arguments))]:
                if value.is_floating_point():
                    signs = torch.randint(2, value.shape, generator=generator).to(value) * 2 - 1
                    value.mul_(1 + signs * torch.finfo(value.dtype).eps)
        for name, value in _outputs(moved, arguments[0], arguments[1]).items():
            spread[name] = max(spread[name], float(_difference(expected[name], value).max()) if value.numel() else 0.0)
    weights = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    terms = max((parameter.numel() // max(parameter.shape[0], 1) for parameter in weights), default=1) * max(len(weights), 1)
    last = {name: torch.finfo(x.dtype).eps * _largest(x) if x.is_floating_point() else 0.0 for name, x in expected.items()}
    return {name: math.sqrt(terms) * spread[name] + last[name] for name in expected}
