"""Local kernels: the same values as plain operations, in the same memory format; without a compiler, a warning."""

import pytest
import torch
from torch import Tensor

from pege_fx import PegeWarning, QuantSpec, functional, kernels

KEY = torch.tensor(99, dtype=torch.int32)


def run(x: Tensor, scale: Tensor, rate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    a, s = x.detach().requires_grad_(), scale.detach().requires_grad_()
    y = functional.fake_quantize(
        a, s, QuantSpec(bits=3), rate=rate, key=None if rate is None else KEY, strength=torch.tensor(1e-2)
    )
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    assert a.grad is not None
    assert s.grad is not None
    return y.detach(), a.grad, s.grad


@pytest.mark.parametrize("layout", ["flat", "channels_last", "rows"])
@pytest.mark.parametrize("masked", [True, False])
def test_kernels_equal_plain_operations(layout: str, masked: bool) -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(32, 8, 16, 16), torch.tensor(0.3)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "rows":
        scale = torch.rand(32, 1, 1, 1) + 0.1
    rate = torch.tensor(0.5) if masked else None
    compiled = run(x, scale, rate)
    with kernels.eager_kernels():
        plain = run(x, scale, rate)
    assert torch.equal(compiled[0], plain[0])
    assert torch.equal(compiled[1], plain[1])
    torch.testing.assert_close(compiled[2], plain[2], rtol=1e-4, atol=1e-4)
    assert compiled[0].stride() == x.stride()


@pytest.mark.parametrize("x", [torch.randn(64, 8, 16, 16)[:, ::2], torch.randn(8, 64, 256).transpose(0, 1)])
def test_other_layouts_are_served_too(x: Tensor) -> None:
    got = run(x, torch.tensor(0.3), torch.tensor(0.5))
    want = run(x.contiguous(), torch.tensor(0.3), torch.tensor(0.5))
    assert torch.equal(got[0], want[0])


def test_small_tensors_and_other_kinds_are_not_compiled() -> None:
    with torch.no_grad():
        assert kernels.worth_compiling(torch.zeros(kernels.SMALLEST))
        assert not kernels.worth_compiling(torch.zeros(kernels.SMALLEST - 1))
        assert not kernels.worth_compiling(torch.zeros(kernels.SMALLEST, device="meta"))
        with kernels.eager_kernels():
            assert not kernels.worth_compiling(torch.zeros(kernels.SMALLEST))
    assert not kernels.worth_compiling(torch.zeros(kernels.SMALLEST))  # under grad: a second derivative may be wanted


def test_without_a_compiler_there_is_one_warning_and_the_right_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(kernels, "_enabled", True)
    monkeypatch.setattr(torch, "compile", no_compiler)
    kernel = kernels.LocalKernel(lambda x: x + 1)
    x = torch.zeros(3)
    with pytest.warns(PegeWarning, match="no C\\+\\+ compiler found.*") as caught:
        assert torch.equal(kernel(x), x + 1)
    assert len(caught) == 1
    with torch.no_grad():
        assert not kernels.worth_compiling(torch.zeros(kernels.SMALLEST))
