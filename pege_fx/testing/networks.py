"""Random networks, with inputs for them, from the names of their layers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from pege_fx.errors import InputError, closest
from pege_fx.modules.batch_norm import BatchNorm
from pege_fx.testing.layers import BLOCKS, CHANNELS, CONVS, HEADS, JOINS, UNWEIGHTED, WEIGHTED, Layer, made


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
        layers: a name each, or a pair of a block's name and the layers inside it; ``layer_names()`` has them all.
        seed: of parameters, statistics and inputs.
        dims: of its convolutions, 1 to 3.

    Raises:
        InputError: for a layer that does not exist.

    >>> Network(["conv", ("residual", ["norm", "relu"])], seed=3)
    Network(['conv', ('residual', ['norm', 'relu'])], seed=3)
    """

    body: nn.Sequential

    def __init__(self, layers: list[Layer], seed: int = 0, dims: int = 2) -> None:
        super().__init__()
        self.layers, self.seed, self.dims = layers, seed, dims
        self._make(body=layers)

    def _make(self, **branches: list[Layer]) -> None:
        _check(branches.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for name, layers in branches.items():
                self.add_module(name, nn.Sequential(*(made(layer, self.dims) for layer in layers)))
        as_trained(self, self.seed)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Return example inputs: a batch of three."""
        return _tensors(1, self.dims, self.seed + seed)

    def contains(self, *names: str) -> bool:
        """Tell whether any layer, also inside a block, has one of these names."""
        return any(name in names for name in _names(self.layers))

    def __repr__(self) -> str:
        return f"Network({self.layers!r}, {self._options()})"

    def _options(self) -> str:
        return f"seed={self.seed}{'' if self.dims == 2 else f', dims={self.dims}'}"


class TwoInputs(Network):
    """A network with two inputs, each with layers of its own, joined at the end.

    Args:
        layers: of the first input, as in ``Network``.
        others: of the second input; None: both go through the same layers.
        join: "add", "multiply", "concat" or "matmul".
        seed, dims: as in ``Network``.

    Raises:
        InputError: for a layer or a join that does not exist.

    >>> TwoInputs(["conv"], ["relu"], "concat")
    TwoInputs(['conv'], ['relu'], 'concat', seed=0)
    """

    other: nn.Sequential

    def __init__(
        self, layers: list[Layer], others: list[Layer] | None = None, join: str = "add", seed: int = 0, dims: int = 2
    ) -> None:
        nn.Module.__init__(self)
        if join not in JOINS:
            raise InputError(f"{join!r} joins nothing: give one of {', '.join(JOINS)}.")
        self.layers, self.others, self.join, self.seed, self.dims = layers, others, join, seed, dims
        self._make(body=layers, **({} if others is None else {"other": others}))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return JOINS[self.join](self.body(x), (self.body if self.others is None else self.other)(y))

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Return example inputs: two batches of three."""
        return _tensors(2, self.dims, self.seed + seed)

    def contains(self, *names: str) -> bool:
        return self.join in names or any(name in names for name in _names([*self.layers, *(self.others or [])]))

    def __repr__(self) -> str:
        return f"TwoInputs({self.layers!r}, {self.others!r}, {self.join!r}, {self._options()})"


def layer_names() -> list[str]:
    """Return the names of all layers, then of all blocks; "head" may only come last.

    >>> layer_names()[:3]
    ['conv', 'conv without bias', 'grouped']
    """
    return [*WEIGHTED, *UNWEIGHTED, *HEADS, *BLOCKS]


def _check(branches: Iterable[list[Layer]]) -> None:
    for name in (name for layers in branches for name in _names(layers)):
        if name not in layer_names():
            raise InputError(f"no layer is called {name!r}; closest: {closest(name, layer_names())}.")


def _tensors(count: int, dims: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    side = {1: 9, 2: 6, 3: 4}[dims]
    return tuple(torch.randn(3, CHANNELS, *[side] * dims, generator=generator) for _ in range(count))


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


def networks(max_layers: int = 5, dims: Sequence[int] = (2, 1, 3), inputs: Sequence[int] = (1, 2)) -> st.SearchStrategy[Case]:
    """A small network and inputs for it; it begins with a layer that has a weight.

    Convolutions (plain, grouped, depthwise, transposed, functional, with a computed weight), linear layers, attention,
    BatchNorms of every kind, activations, pools, dropouts and in-place operations, in residual, concatenating, shared and
    forked blocks, with or without a classifier's head; or two such networks with an input each, joined.

    Args:
        max_layers: at most so many layers to an input, a block counting as one.
        dims: which convolutions, those of one, two or three dimensions; the first shrinks best.
        inputs: how many inputs, one or two; the first shrinks best.

    Raises:
        InputError: for anything else, at once.

    >>> from hypothesis import find
    >>> find(networks(), lambda case: case.network.contains("norm"))
    Case.of(Network(['conv', 'norm'], seed=0))
    """
    try:
        fits = max_layers >= 1 and bool(dims) and set(dims) <= set(CONVS) and bool(inputs) and set(inputs) <= {1, 2}
    except TypeError:  # one number instead of several
        fits = False
    if not fits:
        raise InputError(
            f"max_layers={max_layers!r}, dims={dims!r}, inputs={inputs!r}:"
            " give at least one layer, and lists of dimensions (1 to 3) and inputs (1, 2): networks(dims=[2], inputs=[1, 2])."
        )
    return _cases(max_layers, list(dims), list(inputs))


@st.composite
def _cases(draw: st.DrawFn, max_layers: int, dims: list[int], inputs: list[int]) -> Case:
    simple = st.sampled_from([*WEIGHTED, *UNWEIGHTED])
    blocks = st.tuples(st.sampled_from([*BLOCKS]), st.lists(simple, min_size=1, max_size=3))
    following = st.lists(st.one_of(simple, blocks), max_size=max_layers - 1)
    layers = [draw(st.sampled_from([*WEIGHTED])), *draw(following)]
    seed, dim = draw(st.integers(0, 2**16)), draw(st.sampled_from(dims))
    if draw(st.sampled_from(inputs)) == 2:
        return Case.of(TwoInputs(layers, draw(st.none() | following), draw(st.sampled_from([*JOINS])), seed, dim))
    return Case.of(Network([*layers, *draw(st.sampled_from([[], [*HEADS]]))], seed, dim))
