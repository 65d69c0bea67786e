"""What somebody's own method trains is what is deployed of it, or it is refused with the values."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import ConvertError, ForwardMethod, QuantPolicy, QuantSpec, Rule, fake_quants
from pege_fx.modules.forward_method import Encoding
from pege_fx.modules.method_check import is_own
from pege_fx.modules.methods import LSQ
from pege_fx.numerics.spec import METHODS

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OWN = ("lsq", "pact", "dorefa", "interval", "minmax")


class Affine(ForwardMethod, name="affine-example"):
    """x_c = (x - shift) / 2, restored exactly, on a grid with a zero point: everything that a method may say."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale, self.shift = self.new_parameter(0.1), self.new_parameter(0.25)

    def initialize(self, statistics: Any) -> None:
        with torch.no_grad():
            self.scale.copy_(statistics.max_abs / self.q_max)

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = self.broadcast(self.scale)
        return scale, torch.full_like(scale, 1.0)

    def transform(self, x: Tensor) -> Tensor:
        return (x - self.broadcast(self.shift)) / 2

    def restore(self, y: Tensor) -> Tensor:
        return 2 * y + self.broadcast(self.shift)

    def encoding(self) -> Encoding:
        shift = self.broadcast(self.shift)
        return Encoding(*self.grid_of()[:2], shift, torch.full_like(shift, 2.0))


class Squared(Affine, name="squared-restore"):
    def restore(self, y: Tensor) -> Tensor:
        return 2 * y.abs() * y + self.broadcast(self.shift)


class OddAtOneEnd(Affine, name="odd-at-one-end"):
    """Affine but for its largest level."""

    def restore(self, y: Tensor) -> Tensor:
        return super().restore(torch.where(y >= (self.q_max - 1.5) * self.broadcast(self.scale), 1.5 * y, y))


class HalfZero(Affine, name="half-zero"):
    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = self.broadcast(self.scale)
        return scale, torch.full_like(scale, 0.5)


class OtherShift(Affine, name="other-shift"):
    def encoding(self) -> Encoding:
        scale, zero_point, lower, width = super().encoding()
        assert lower is not None
        return Encoding(scale, zero_point, lower + 0.5, width)


class OtherWidth(Affine, name="other-width"):
    def encoding(self) -> Encoding:
        return Encoding(*self.grid_of()[:2], self.broadcast(self.shift))


class InheritedEncoding(METHODS["pact"], name="inherited-encoding"):  # type: ignore[misc]
    """A clip of another kind, whose codes the clip of the class above does not make."""

    def transform(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class ClippedLate(LSQ, name="clipped-late"):
    def decoding(self) -> Any:
        return super().decoding()._replace(scale=1.1 * super().decoding().scale)


class NoScale(LSQ, name="no-scale"):
    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.full_like(super().qparams(x)[0], float("nan")), None


def prepared(method: str, kind: str, dtype: torch.dtype = torch.float32, bits: int = 4, **more: Any) -> GraphModule:
    torch.manual_seed(0)
    spec = QuantSpec(bits=bits, method=method, **more)
    rule = Rule(weight=spec, input=None) if kind == "weight" else Rule(weight=None, input=spec)
    return pege_fx.prepare(nn.Sequential(nn.Linear(16, 8)).to(dtype), QuantPolicy((rule,)), (X.to(dtype),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_method_that_says_one_function_passes(kind: str, dtype: torch.dtype, bits: int) -> None:
    gm = prepared("affine-example", kind, dtype, bits)
    trained = gm(X.to(dtype))
    found = gm.eval()(X.to(dtype))
    tolerance = 0.5 if dtype is torch.bfloat16 else 0.1 if dtype is torch.float16 else 1e-4
    torch.testing.assert_close(trained, found, rtol=0, atol=tolerance)
    assert torch.equal(pege_fx.convert(gm)(X.to(dtype)), found)


WRONG = {
    "squared-restore": ("weight", r"(?s)levels in training: .*levels deployed: "),
    "odd-at-one-end": ("activation", r"(?s)levels in training: .*levels deployed: "),
    "half-zero": ("weight", r"zero point 0\.5, which is no whole number"),
    "other-shift": ("activation", r"(?s)codes in training: .*codes deployed: "),
    "other-width": ("activation", r"(?s)codes in training: .*codes deployed: "),
    "inherited-encoding": ("activation", r"(?s)codes in training: .*codes deployed: "),
    "clipped-late": ("weight", r"(?s)levels in training: .*levels deployed: "),
    "no-scale": ("activation", r"the scale nan"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG)
def test_one_that_says_two_is_refused_with_the_values(name: str, dtype: torch.dtype) -> None:
    kind, message = WRONG[name]
    with pytest.raises(ConvertError, match=message) as caught:
        prepared(name, kind, dtype)(X.to(dtype))
    assert str(dtype).removeprefix("torch.") in str(caught.value) or "float32" in str(caught.value)
    assert METHODS[name].__name__ in str(caught.value)


@pytest.mark.parametrize("use", [lambda gm: gm(X), lambda gm: gm.eval()(X), pege_fx.convert])
def test_whoever_uses_it_first(use: Callable[[GraphModule], object]) -> None:
    gm = prepared("affine-example", "weight")
    method = fake_quants(gm)["0.weight_fq"].method
    method.__class__ = METHODS["squared-restore"]
    other = copy.deepcopy(gm).train()  # another mode: what was found holds no longer
    with pytest.raises(ConvertError, match="levels in training"):
        use(other)


def test_another_dtype_is_another_first_use() -> None:
    class OnlyInHalf(Affine, name="only-in-half"):
        def restore(self, y: Tensor) -> Tensor:
            return super().restore(y * y.abs() if y.dtype is torch.bfloat16 else y)

    gm = prepared("only-in-half", "activation")
    gm(X)
    with pytest.raises(ConvertError, match="bfloat16"):
        gm.bfloat16()(X.bfloat16())


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_our_own_methods_would_pass(method: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pege_fx.modules.fake_quant.is_own", lambda _: False)
    for bits, signed in itertools.product((2, 3, 8), (True, False, None)):
        gm = prepared(method, kind, dtype, bits, signed=signed)
        assert is_own(next(iter(fake_quants(gm).values())).method)
        gm(X.to(dtype))
        gm.eval()(X.to(dtype))
