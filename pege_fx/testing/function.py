"""Whether two modules compute the same, up to the rounding that their depth and dtype explain."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
        terms = [y.square().sum() for _, y in _flat("", outputs) if y.requires_grad]
        wanted = inputs | {name: self.module.get_parameter(name) for name in self.names}
        if not terms or not wanted:
            return {name: torch.zeros_like(value) for name, value in wanted.items()}
        loss = torch.stack(terms).sum()
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(wanted, found, strict=True))


class BuffersAfter(nn.Module):
    """The buffers of a module after a call, as a function of its inputs, by name: what training leaves of a batch.

    >>> list(BuffersAfter(nn.BatchNorm1d(2))(torch.ones(4, 2)))
    ['running_mean', 'running_var', 'num_batches_tracked']

    Args:
        module: any; it is changed as a call changes it.
        names: of the buffers to look at; default: all.
    """

    def __init__(self, module: nn.Module, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.module = module
        self.names = [name for name, _ in module.named_buffers()] if names is None else list(names)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.module(*args, **kwargs)
        return {name: self.module.get_buffer(name).clone() for name in self.names}


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


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
    allowed: dict[str, float] = {}
    for name, x in expected.items():
        y = found[name]
        assert x.shape == y.shape, f"{name} has shape {tuple(y.shape)} instead of {tuple(x.shape)}"
        assert x.dtype == y.dtype, f"{name} is {y.dtype} instead of {x.dtype}"
        difference = _difference(x, y)
        if not difference.any():
            continue
        if tolerance is None:
            allowed = allowed or _rounding(a, inputs, kwargs, expected)
        bound = allowed[name] if tolerance is None else tolerance * _largest(x)
        worst = int(difference.argmax())
        assert float(difference.flatten()[worst]) <= bound, (
            f"{name} differs by {float(difference.max()):.3g} where {bound:.3g} is allowed: element {worst} of "
            f"{tuple(x.shape)} is {float(y.flatten()[worst]):.9g} instead of {float(x.flatten()[worst]):.9g}; "
            f"{int((difference > bound).sum())} of {x.numel()} elements differ by more."
        )


def _outputs(module: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    return _run(copy.deepcopy(module), *copy.deepcopy((tuple(inputs), dict(kwargs))))


def _run(module: nn.Module, args: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes as long as a small model where CUDA is not in use
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(0)
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
        for name, value in _run(moved, *arguments).items():
            spread[name] = max(spread[name], float(_difference(expected[name], value).max()) if value.numel() else 0.0)
    weights = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    terms = max((parameter.numel() // max(parameter.shape[0], 1) for parameter in weights), default=1) * max(len(weights), 1)
    last = {name: torch.finfo(x.dtype).eps * _largest(x) if x.is_floating_point() else 0.0 for name, x in expected.items()}
    return {name: math.sqrt(terms) * spread[name] + last[name] for name in expected}
