"""The layers that test networks are made of: four channels in, four channels out, the same size."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 4
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MAX_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEAN_POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_POOLS: dict[int, Any] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
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


class Attention(nn.Module):
    """Every position attends to every other one, by torch's module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        out: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return out.transpose(1, 2).reshape_as(x).contiguous()  # a dropout behind it draws in the order of memory


class AttentionByHand(nn.Module):
    """Every position attends to every other one: softmax(q k) v, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        scores = torch.softmax(self.query(tokens) @ self.key(tokens).transpose(1, 2) / 2, -1)
        return torch.matmul(scores, self.value(tokens)).transpose(1, 2).reshape_as(x).contiguous()


# The first of each shrinks best.
WEIGHTED: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda dims: CONVS[dims](CHANNELS, CHANNELS, 3, padding=1),
    "conv without bias": lambda dims: CONVS[dims](CHANNELS, CHANNELS, 3, padding=1, bias=False),
    "grouped": lambda dims: CONVS[dims](CHANNELS, CHANNELS, 3, padding=1, groups=2),
    "depthwise": lambda dims: CONVS[dims](CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
    "transposed": lambda dims: _TRANSPOSED[dims](CHANNELS, CHANNELS, 3, padding=1),
    "transposed grouped": lambda dims: _TRANSPOSED[dims](CHANNELS, CHANNELS, 3, padding=1, groups=2),
    "functional": lambda dims: Functional(dims, scaled=False),
    "functional scaled": lambda dims: Functional(dims, scaled=True),
    "linear": lambda dims: Mixed(),
    "gate": Gate,
    "attention": lambda dims: Attention(),
    "attention by hand": lambda dims: AttentionByHand(),
}
UNWEIGHTED: dict[str, Callable[[int], nn.Module]] = {
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
        self.body, self.other = body, CONVS[dims](CHANNELS, CHANNELS, 1)
        self.mix = CONVS[dims](2 * CHANNELS, CHANNELS, 1, groups=2)

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
        self.conv, self.body = CONVS[dims](CHANNELS, CHANNELS, 1), body

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.body(y) * torch.sigmoid(y)
        return out


BLOCKS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "residual": Residual,
    "concat": Concatenation,
    "twice": Twice,
    "shared input": SharedInput,
}


class Head(nn.Module):
    """What a classifier ends with: the mean over all positions, and a linear layer with three classes."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.pool, self.fc = ADAPTIVE_POOLS[dims](1), nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return out


HEADS: dict[str, Callable[[int], nn.Module]] = {"head": Head}

# What two branches of a network end in.
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "multiply": lambda x, y: x * y,
    "concat": lambda x, y: torch.cat([x, y], 1),
    "matmul": lambda x, y: x @ y.transpose(-1, -2),
}

Layer: TypeAlias = "str | tuple[str, list[Any]]"  # a name, or a block's name and its layers


def made(layer: Layer, dims: int) -> nn.Module:
    """Return a new layer of this name, or block of this name around its layers."""
    if isinstance(layer, str):
        return (WEIGHTED | UNWEIGHTED | HEADS)[layer](dims)
    name, layers = layer
    return BLOCKS[name](nn.Sequential(*(made(inner, dims) for inner in layers)), dims)
