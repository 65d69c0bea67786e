"""Numbers that are computed from sizes, or read from tensors: what Python computes, ONNX Runtime computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pege_fx

pytest.importorskip("onnx")

X = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))


class Sized(nn.Module):
    """A layer, and something beside it that a size decides."""

    def __init__(self, function: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x), x.shape[2])


OF_SIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rounded down": lambda y, n: y * (n // 3) + (-n // 3) - n % 3 + (-n) % 3,
    "a quotient": lambda y, n: y * (n / 4) + n**2 / 7,
    "largest and smallest": lambda y, n: y + max(n, 1) if n > 0 else y,
    "a slice from its middle": lambda y, n: y[:, :, n // 2 :],
    "a range of numbers that are not whole": lambda y, n: y + torch.arange(0.5, n + 0.5).view(1, 1, -1, 1),
    "filled": lambda y, n: y + torch.full((1, 1, n, 1), n / 2),
    "a root": lambda y, n: y * (n * 1.0) ** -0.5,
    "halves": lambda y, n: y.chunk(2, 2)[0].sum(2) + y.chunk(2, 2)[1].sum(2),
    "pieces": lambda y, n: torch.cat([part.mean(2) for part in y.split([n // 2, n - n // 2], 2)], 1),
    "padded": lambda y, n: nn.functional.pad(y, (0, 0, n // 4, n % 3)),
}


@pytest.mark.filterwarnings("ignore:the model. fixed as in the example inputs")
@pytest.mark.parametrize("name", OF_SIZES)
def test_numbers_of_sizes(name: str, tmp_path: Path) -> None:
    model = pege_fx.convert(pege_fx.prepare(Sized(OF_SIZES[name]).eval(), "W4A4", (X,)))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", (X,), dynamic_shapes={"x": {2: "height"}})
    others = [X, torch.randn(1, 3, 11, 6), torch.randn(3, 3, 20, 6)]
    report = pege_fx.verify_export(model, tmp_path / "model.onnx", others)
    assert report.ok, report


class Filled(nn.Module):
    """A tensor as a number, known at the export or computed."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], known: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.function, self.known = nn.Conv2d(3, 4, 3, padding=1), function, known
        self.register_buffer("stride", torch.tensor([8.0, 16.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.function(y, self.stride[1] if self.known else y.amax() / 3)


OF_TENSORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "full": lambda y, v: y * torch.full((1, 4, 1, 1), v),
    "full of the batch": lambda y, v: y * torch.full((y.shape[0], 1, 1, 1), v),
    "full_like": lambda y, v: y + torch.full_like(y, v),
    "new_full": lambda y, v: y + y.new_full((4, 1, 1), v),
    "a number": lambda y, v: y + torch.full((), v),
    "masked_fill": lambda y, v: y.masked_fill(y > 0, v),
    "where": lambda y, v: torch.where(y > 0, y, v) + torch.where(y > 0, v, 1.0),
    "fill_": lambda y, v: y + torch.empty_like(y).fill_(v),
    "clamp": lambda y, v: y.clamp(max=v) + y.clamp(-v, v),
    "a power": lambda y, v: y.abs() ** v.clamp(max=2),
    "written": lambda y, v: _written(y, v),
}


def _written(y: Tensor, v: Tensor) -> Tensor:
    z = y.clone()
    z[:, 0] = v
    return z


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", OF_TENSORS)
@pytest.mark.filterwarnings("ignore:.*stays Python")
def test_a_tensor_as_a_number(name: str, known: bool, tmp_path: Path) -> None:
    model = pege_fx.convert(pege_fx.prepare(Filled(OF_TENSORS[name], known).eval(), "W4A4", (X,)))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", (X,))
    report = pege_fx.verify_export(model, tmp_path / "model.onnx", [X, X[:1]])
    assert report.ok, report
