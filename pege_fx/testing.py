"""Property-based testing of graph rewrites: Hypothesis strategies for formats, tensors and networks, and one assertion.

Needs the extra ``test``. Strategies shrink to one plain convolution, and what they draw prints as a short list of layers.

>>> from hypothesis import given
>>> @given(networks())
... def test_my_pass_keeps_the_function(case):
...     network, inputs = case
...     assert_same_function(network, my_pass(network), inputs)
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from pege_fx.policy import QuantPolicy, Rule
from pege_fx.spec import MAX_BITS, MIN_BITS, QuantSpec

CHANNELS = 4
LAYERS = (
    "conv",
    "norm",
    "relu",
    "linear mix",
    "residual",
    "branch",
    "pool",
    "depthwise",
    "transposed",
    "twice",
    "dropout",
    "inplace",
)


def specs(**fixed: Any) -> st.SearchStrategy[QuantSpec]:
    """Number formats of the default method; ``fixed`` fields are taken as they are."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "bits": st.integers(MIN_BITS, MAX_BITS),
        "granularity": st.sampled_from(["channel", "tensor"]),
        "estimator": st.sampled_from(["pege", "ste", "ewgs"]),
    }
    return st.builds(QuantSpec, **{name: st.just(fixed[name]) if name in fixed else drawn[name] for name in {**drawn, **fixed}})


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype = torch.float32, max_side: int = 6) -> Tensor:
    """Tensors of one to four dimensions, seeded, with a spread from 1e-3 to 1e3."""
    shape = draw(st.lists(st.integers(1, max_side), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return (torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-3, 3))).to(dtype)


@st.composite
def policies(draw: st.DrawFn) -> QuantPolicy:
    """A default rule, and sometimes float or eight bits for the first and last operation."""
    rules = [Rule(weight=draw(specs()), input=draw(specs(granularity="tensor")))]
    for role in ("first", "last"):
        if (setting := draw(st.sampled_from(["leave", "8", None]))) != "leave":
            rules.append(Rule(role=role, weight=setting, input=setting))
    return QuantPolicy(tuple(rules))


class Layer(nn.Module):
    """One layer of a ``Network``, by name; four channels in, four channels out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv: nn.Module
        if kind in ("conv", "residual", "branch", "twice"):
            self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        if kind == "branch":
            self.other, self.mix = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(2 * CHANNELS, CHANNELS, 1, groups=2)
        if kind in ("norm", "residual", "transposed"):
            self.bn = nn.BatchNorm2d(CHANNELS)
        if kind == "linear mix":
            self.fc = nn.Linear(CHANNELS, CHANNELS)
        if kind == "depthwise":
            self.conv, self.bn = (
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
                nn.BatchNorm2d(CHANNELS),
            )
        if kind == "transposed":
            self.conv = nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, groups=2)
        if kind in ("pool", "dropout", "relu", "inplace"):
            made = {
                "pool": nn.MaxPool2d(3, 1, 1),
                "dropout": nn.Dropout(0.5),
                "relu": nn.ReLU(),
                "inplace": nn.ReLU(inplace=True),
            }
            self.act = made[kind]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if self.kind == "residual":
            out = torch.relu(self.bn(self.conv(x)) + x)
        elif self.kind == "branch":
            out = self.mix(torch.cat([self.conv(x), self.other(x)], 1))
        elif self.kind == "twice":
            out = self.conv(torch.relu(self.conv(x)))
        elif self.kind == "linear mix":
            out = self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.kind in ("depthwise", "transposed"):
            out = self.bn(self.conv(x))
        elif self.kind == "inplace":
            x = x + 1
            x += 1
            out = self.act(x)
        else:
            out = getattr(self, {"conv": "conv", "norm": "bn"}.get(self.kind, "act"))(x)
        return out


@dataclass(eq=False)
class Network(nn.Module):
    """A stem convolution, the named layers, and a linear head; weights and statistics from the seed."""

    layers: list[str]
    seed: int

    def __post_init__(self) -> None:
        super().__init__()
        torch.manual_seed(self.seed)
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.body = nn.Sequential(*(Layer(kind) for kind in self.layers))
        self.head = nn.Linear(CHANNELS, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.1, 2)
                nn.init.normal_(module.weight)
                with torch.no_grad():
                    module.weight[0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return out


@st.composite
def networks(draw: st.DrawFn, max_layers: int = 5) -> tuple[Network, tuple[Tensor, ...]]:
    """A small network and inputs for it: residual, branched, shared, depthwise, transposed, pooled, in-place, normed."""
    layers = draw(st.lists(st.sampled_from(LAYERS), max_size=max_layers))
    seed = draw(st.integers(0, 2**16))
    inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return Network(layers, seed), (inputs,)


def assert_same_function(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...], tolerance: float | None = None) -> None:
    """Assert that two modules in their present modes compute the same.

    Args:
        tolerance: largest difference allowed, relative to the largest output; 0 demands equal bits. Default: the dtype's
            epsilon times 16 for each module that computes, because each may round once more and errors grow on the way.
    """
    torch.manual_seed(0)
    x = a(*copy.deepcopy(inputs))
    torch.manual_seed(0)
    y = b(*copy.deepcopy(inputs))
    if tolerance is None:
        depth = sum(1 for module in a.modules() if next(module.children(), None) is None)
        tolerance = 16 * torch.finfo(x.dtype).eps * max(depth, 1)
    if tolerance == 0:
        assert torch.equal(x, y), f"the outputs differ by up to {float((x - y).detach().abs().max())}"
        return
    largest = max(float(x.detach().abs().max()), 1e-30)
    difference = float((x - y).detach().abs().max()) / largest
    assert difference <= tolerance, f"the outputs differ by {difference:.3g} of the largest, more than {tolerance:.3g}"
