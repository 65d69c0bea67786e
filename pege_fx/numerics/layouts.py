"""Scale layouts as values: which elements of a tensor share a scale.

The elements that share one are a tile. A layout shows a tensor with its tiles in place (``tiles``), so that scales of one value
for each tile broadcast to it, and gives the tensor back (``untiled``). Groups and tokens are the rows of a matrix, which is
what kernels for rows compute on. Masks number elements in row-major order, which tiles keep.
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor
from torch.nn import functional as F

from pege_fx.errors import SpecError

Kind: TypeAlias = Literal["weight", "activation"]


@dataclass(frozen=True)
class Channels:
    """Where a weight keeps its output channels.

    ``axis`` is 0 for convolutions, linear and embedding; 1 for transposed convolutions, whose weight has
    shape (in, out / groups, *kernel), so that output channel ``g * out / groups + j`` is at column j of the
    g-th block of rows.
    """

    count: int
    axis: int = 0
    groups: int = 1

    def broadcast(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Lay one value per output channel (shape ``(count,)``) out so that it broadcasts to a weight of ``shape``."""
        trailing = (1,) * (len(shape) - self.axis - 1)
        if self.axis == 0:
            return values.reshape(-1, *trailing)
        rows = values.reshape(self.groups, 1, -1).expand(self.groups, shape[0] // self.groups, -1)
        return rows.reshape(shape[0], -1, *trailing) if self.groups > 1 else values.reshape(1, -1, *trailing)

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weight with one row per output channel, shape ``(count, elements per channel)``."""
        if self.axis == 0:
            return weight.reshape(self.count, weight.shape[1:].numel())
        rows, positions = weight.shape[0] // self.groups, weight.shape[2:].numel()
        split = weight.reshape(self.groups, rows, self.count // self.groups, positions)
        return split.transpose(1, 2).reshape(self.count, rows * positions)


class ScaleLayout(ABC):
    """Which elements share a scale. Methods see a weight as a matrix (output channels, inputs), an activation as it is.

    >>> layout_named("group-32"), layout_named("token")
    (PerGroup(size=32, pad=False), PerToken())

    Attributes:
        name: what specs and files call it.
        kinds: the edges that can have it.
        is_static: the number of scales is known before an activation is seen, so that they can be learned or observed.
        of_matrix: weights are seen as a matrix; otherwise as they are.
    """

    name: str
    kinds: ClassVar[tuple[Kind, ...]] = ("weight", "activation")
    is_static: ClassVar[bool] = True
    of_matrix: ClassVar[bool] = True

    @abstractmethod
    def scale_shape(self, shape: tuple[int, ...], channels: Channels | None) -> tuple[int, ...]:
        """Return the shape in which the scales of a tensor of ``shape`` are kept."""

    @abstractmethod
    def broadcast(self, values: Tensor, shape: tuple[int, ...], channels: Channels | None) -> Tensor:
        """Lay values of ``scale_shape`` out so that they broadcast to ``tiles``."""

    @abstractmethod
    def tiles(self, x: Tensor) -> Tensor:
        """Show a tensor with its tiles in place."""

    def untiled(self, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo ``tiles`` of a tensor of ``shape``."""
        return y.reshape(shape)

    def rows(self, x: Tensor, channels: Channels | None) -> Tensor:
        """Return a tensor with one row per scale, shape (scales, elements of a tile)."""
        return self.tiles(x)

    def check(self, shape: tuple[int, ...], where: str) -> None:  # noqa: B027 (any shape will do)
        """Raise ``SpecError`` if a tensor of ``shape`` can not have this layout."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PerTensor(ScaleLayout):
    """One scale.

    >>> PerTensor().scale_shape((64, 256), None)
    (1,)
    """

    name = "tensor"
    of_matrix = False

    def scale_shape(self, shape: tuple[int, ...], channels: Channels | None) -> tuple[int, ...]:
        return (1,)  # FSDP refuses parameters without dimensions

    def broadcast(self, values: Tensor, shape: tuple[int, ...], channels: Channels | None) -> Tensor:
        return values.reshape(()) if values.numel() == 1 else values

    def tiles(self, x: Tensor) -> Tensor:
        return x

    def rows(self, x: Tensor, channels: Channels | None) -> Tensor:
        return x.reshape(1, -1)


@dataclass(frozen=True)
class PerChannel(ScaleLayout):
    """One scale for each output channel of a weight: (64, 3, 3, 3) -> 64 scales.

    >>> PerChannel().scale_shape((64, 3, 3, 3), Channels(64))
    (64,)
    """

    name = "channel"
    kinds = ("weight",)
    of_matrix = False

    def scale_shape(self, shape: tuple[int, ...], channels: Channels | None) -> tuple[int, ...]:
        return (1 if channels is None else channels.count,)

    def broadcast(self, values: Tensor, shape: tuple[int, ...], channels: Channels | None) -> Tensor:
        return PerTensor().broadcast(values, shape, channels) if channels is None else channels.broadcast(values, shape)

    def tiles(self, x: Tensor) -> Tensor:
        return x

    def rows(self, x: Tensor, channels: Channels | None) -> Tensor:
        return x.reshape(1, -1) if channels is None else channels.rows(x)


@dataclass(frozen=True)
class PerGroup(ScaleLayout):
    """One scale for each run of ``size`` elements along the input dimension: weight (64, 256), size 32 -> scales (64, 8).

    A weight's inputs are all behind its output channels, in row-major order: (64, 3, 3, 3) has 27. Of an activation they are
    the last dimension. With ``pad`` the last group of each row may be smaller; else a size that does not divide is an error.

    >>> PerGroup(32).scale_shape((64, 256), Channels(64))
    (64, 8)
    """

    size: int
    pad: bool = False

    def __post_init__(self) -> None:
        _check_size("a group", self.size)

    @property
    def name(self) -> str:  # type: ignore[override]
        """As a spec has it."""
        return f"group-{self.size}{'-pad' if self.pad else ''}"

    def check(self, shape: tuple[int, ...], where: str) -> None:
        length = shape[-1]
        if self.pad or length % self.size == 0:
            return
        fitting = [size for size in range(1, length + 1) if length % size == 0]
        nearest = sorted(sorted(fitting, key=lambda size: abs(size - self.size))[:3])
        raise SpecError(
            f"{where}: groups of {self.size} do not divide its {length} inputs.\n"
            f"  sizes that fit: {', '.join(map(str, nearest))}; or let the last group be smaller:"
            f" PerGroup({self.size}, pad=True)."
        )

    def scale_shape(self, shape: tuple[int, ...], channels: Channels | None) -> tuple[int, ...]:
        return *shape[:-1], -(-shape[-1] // self.size)

    def broadcast(self, values: Tensor, shape: tuple[int, ...], channels: Channels | None) -> Tensor:
        return values.reshape(-1, 1)

    def tiles(self, x: Tensor) -> Tensor:
        if self.pad and x.shape[-1] % self.size:
            x = F.pad(x, (0, -x.shape[-1] % self.size))
        return x.reshape(-1, self.size)

    def untiled(self, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.pad and shape[-1] % self.size:
            return y.reshape(*shape[:-1], -1)[..., : shape[-1]]
        return y.reshape(shape)


@dataclass(frozen=True)
class PerBlock(ScaleLayout):
    """One scale for each block of ``row_count`` output channels by ``columns`` inputs.

    >>> PerBlock(128, 128).scale_shape((256, 512), Channels(256))
    (2, 4)
    """

    row_count: int
    columns: int
    kinds = ("weight",)

    def __post_init__(self) -> None:
        _check_size("a block's side", self.row_count)
        _check_size("a block's side", self.columns)

    @property
    def name(self) -> str:  # type: ignore[override]
        """As a spec has it."""
        return f"block-{self.row_count}x{self.columns}"

    def check(self, shape: tuple[int, ...], where: str) -> None:
        if len(shape) != 2 or shape[0] % self.row_count or shape[1] % self.columns:
            raise SpecError(
                f"{where}: blocks of {self.row_count} x {self.columns} do not divide its {' x '.join(map(str, shape))}.\n"
                "  give sides that divide the number of output channels and of inputs."
            )

    def scale_shape(self, shape: tuple[int, ...], channels: Channels | None) -> tuple[int, ...]:
        return shape[0] // self.row_count, shape[1] // self.columns

    def broadcast(self, values: Tensor, shape: tuple[int, ...], channels: Channels | None) -> Tensor:
        return values.reshape(shape[0] // self.row_count, 1, -1, 1)

    def tiles(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] // self.row_count, self.row_count, -1, self.columns)

    def rows(self, x: Tensor, channels: Channels | None) -> Tensor:
        return self.tiles(x).transpose(1, 2).reshape(-1, self.row_count * self.columns)


@dataclass(frozen=True)
class PerToken(ScaleLayout):
    """One scale for each token, a row along an activation's last dimension.

    >>> PerToken().scale_shape((8, 128, 512), None)
    (8, 128, 1)
    """

    name = "token"
    kinds = ("activation",)
    is_static = False

    def scale_shape(self, shape: tuple[int, ...], channels: Channels | None) -> tuple[int, ...]:
        return *shape[:-1], 1

    def broadcast(self, values: Tensor, shape: tuple[int, ...], channels: Channels | None) -> Tensor:
        return values.reshape(-1, 1)

    def tiles(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])


def _check_size(what: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise SpecError(f"{what} of {size!r} elements: give a positive whole number.")


_GROUP = re.compile(r"(?:group-|g)(\d{1,6})(-pad)?")
_BLOCK = re.compile(r"(?:block-|b)(\d{1,6})x(\d{1,6})")
_BY_NAME: dict[str, ScaleLayout] = {"tensor": PerTensor(), "channel": PerChannel(), "token": PerToken()}


def add_layout(layout: ScaleLayout) -> None:
    """Make a layout of your own known by its name, see docs/extending.md.

    Args:
        layout: hashable, as a frozen dataclass is.

    Raises:
        SpecError: if one of another class has that name.

    >>> add_layout(PerGroup(48))
    """
    known = _BY_NAME.get(layout.name)
    if known is not None and type(known).__qualname__ != type(layout).__qualname__:
        raise SpecError(f"the scale layout {layout.name!r} is already {known!r}: choose another name.")
    _BY_NAME[layout.name] = layout


def layout_named(name: Any) -> ScaleLayout:
    """Return a layout by its name: "tensor", "channel", "token", "group-32" (or "g32"), "block-128x128", or one that was added.

    Raises:
        SpecError: for a name that is not known.
    """
    if isinstance(name, ScaleLayout):
        return name
    text = str(name)
    if (group := _GROUP.fullmatch(text)) is not None:
        return PerGroup(int(group[1]), pad=bool(group[2]))
    if (block := _BLOCK.fullmatch(text)) is not None:
        return PerBlock(int(block[1]), int(block[2]))
    if text in _BY_NAME:
        return _BY_NAME[text]
    more = ", ".join(f'"{known}"' for known in (*_BY_NAME, "group-32", "block-128x128") if known not in ("channel", "tensor"))
    raise SpecError(f'granularity={name!r}: give "channel", "tensor", or None for the default; or {more}, or a ScaleLayout.')


@dataclass(frozen=True)
class Tiling:
    """A layout on one edge: what the arithmetic of that edge asks.

    Attributes:
        layout: which elements share a scale.
        kind: of the edge.
        shape: of the weight; None for activations.
        channels: where a weight keeps its output channels, None where it has none.
    """

    layout: ScaleLayout
    kind: Kind
    shape: tuple[int, ...] | None = None
    channels: Channels | None = None

    @property
    def by_channel(self) -> bool:
        """Whether no two output channels share a scale."""
        return self.channels is not None and isinstance(self.layout, PerChannel | PerGroup)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of scales that are kept; of a layout whose scales are kept."""
        shape = (1,) if self.shape is None else self.shape
        return self.layout.scale_shape(self._matrix_shape(shape), self.channels)

    def broadcast(self, values: Tensor) -> Tensor:
        """Lay values of ``scale_shape`` out so that they broadcast to ``tiles``."""
        return self.layout.broadcast(values, self._matrix_shape(self.shape or ()), self.channels)

    def kept(self, values: Tensor) -> Tensor:
        """Undo ``broadcast``, as far as scales are kept in another shape than they broadcast in."""
        return values.reshape(self.scale_shape) if self.layout.of_matrix else values

    def tiles(self, x: Tensor) -> Tensor:
        """Show a tensor with its tiles in place."""
        return self.layout.tiles(self._matrix(x))

    def untiled(self, y: Tensor, like: Tensor) -> Tensor:
        """Undo ``tiles``: return ``y`` in the shape of ``like``."""
        if not self.layout.of_matrix:
            return y
        shape = self._matrix_shape(like.shape)
        y = self.layout.untiled(y, shape)
        if not self._is_turned:
            return y.reshape(like.shape)
        return y.reshape(like.shape[1], like.shape[0], *like.shape[2:]).transpose(0, 1)

    def rows(self, x: Tensor) -> Tensor:
        """Return a tensor with one row per scale, shape (scales, elements of a tile)."""
        return self.layout.rows(self._matrix(x), self.channels)

    @property
    def _is_turned(self) -> bool:
        return self.channels is not None and self.channels.axis == 1

    def _matrix(self, x: Tensor) -> Tensor:
        if self.kind == "activation" or not self.layout.of_matrix:
            return x
        return (x.transpose(0, 1) if self._is_turned else x).flatten(1)

    def _matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.kind == "activation" or not self.layout.of_matrix or len(shape) < 2:
            return tuple(shape)
        rows = shape[1 if self._is_turned else 0]
        return rows, math.prod(shape) // max(rows, 1)

    def check(self, where: str) -> None:
        """Raise ``SpecError`` if this edge can not have its layout."""
        layout = self.layout
        if self.kind not in layout.kinds:
            raise SpecError(
                f'{where}: granularity="{layout}" is for {layout.kinds[0]}s, not for {"an" if self.kind[0] == "a" else "a"} '
                f'{self.kind}.\n  give a weight "channel" or a group, an activation "tensor" or "token".'
            )
        if self.shape is None or not layout.of_matrix:
            return
        if self.channels is None or self.channels.groups > 1:
            raise SpecError(
                f'{where}: granularity="{layout}" needs a weight with output channels on one axis, '
                f'which this one of shape {self.shape} has not.\n  give "tensor" or "channel".'
            )
        layout.check(self._matrix_shape(self.shape), where)
