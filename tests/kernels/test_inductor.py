"""Local kernels: the same values as plain operations, in the same memory format; without a compiler, a warning.

They serve what no kernel written by hand does; those are left out here.
"""

import os
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pege_fx import PegeWarning, QuantSpec, functional
from pege_fx.kernels import inductor
from pege_fx.numerics import discretizer

KEY = torch.tensor(99, dtype=torch.int32)


@pytest.fixture(autouse=True)
def _none_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discretizer, "backend_for", lambda _: None)


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
    with inductor.eager_kernels():
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


def test_a_kernel_is_compiled_while_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler traces with fx, which patches ``nn.Module`` while it does, for all threads."""
    free: list[bool] = []

    def compiled(function: Any, **_: Any) -> Any:
        def run(*args: Any) -> Any:
            other = threading.Thread(target=lambda: free.append(inductor.TRACING.acquire(blocking=False)))
            other.start()
            other.join()
            return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    double = inductor.LocalKernel(lambda x: 2 * x)
    assert double(1) == 2
    assert free == [False]
    other = threading.Thread(target=double, args=(2,))
    with inductor.TRACING:
        other.start()
        other.join(0.2)
        assert other.is_alive()
    other.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_may_compile_whatever_a_thread_did_meanwhile() -> None:
    holding = threading.Event()

    def hold() -> None:
        with inductor.TRACING:
            holding.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if inductor.TRACING.acquire(timeout=5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()


def test_small_tensors_and_other_kinds_are_not_compiled() -> None:
    with torch.no_grad():
        assert inductor.worth_compiling(torch.zeros(inductor.SMALLEST))
        assert not inductor.worth_compiling(torch.zeros(inductor.SMALLEST - 1))
        assert not inductor.worth_compiling(torch.zeros(inductor.SMALLEST, device="meta"))
        with inductor.eager_kernels():
            assert not inductor.worth_compiling(torch.zeros(inductor.SMALLEST))
    assert not inductor.worth_compiling(torch.zeros(inductor.SMALLEST))  # under grad: a second derivative may be wanted


def test_plain_operations_asked_for_in_two_threads_end_with_the_last_of_them() -> None:
    first, second, x = inductor.eager_kernels(), inductor.eager_kernels(), torch.zeros(inductor.SMALLEST)
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # no nesting: the first is done before the second
        assert not inductor.worth_compiling(x)
        second.__exit__(None, None, None)
        assert inductor.worth_compiling(x)


def test_nothing_hides_from_make_fx() -> None:
    x, scale = torch.randn(2, inductor.SMALLEST // 2), torch.tensor(0.3)
    traced = make_fx(lambda x: functional.fake_quantize(x, scale, QuantSpec(bits=3)))(x)
    assert torch.ops.aten.round.default in {node.target for node in traced.graph.nodes}
    other = torch.randn_like(x)
    assert torch.equal(traced(other), functional.fake_quantize(other, scale, QuantSpec(bits=3)))
    assert inductor._enabled


class Traced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if inductor.is_traced() else x


@pytest.mark.parametrize("strict", [True, False])
def test_a_thread_knows_that_it_is_traced_by_a_compiler_or_for_export(strict: bool) -> None:
    x = torch.zeros(2)
    assert torch.equal(Traced()(x), x)
    assert torch.equal(torch.compile(Traced(), backend="eager")(x), x + 1)
    assert torch.equal(torch.export.export(Traced(), (x,), strict=strict).module()(x), x + 1)


def test_without_a_compiler_there_is_one_warning_and_the_right_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler found\nand more that only its author reads")

    monkeypatch.setattr(inductor, "_enabled", True)
    monkeypatch.setattr(torch, "compile", no_compiler)
    kernel = inductor.LocalKernel(lambda x: x + 1)
    x = torch.zeros(3)
    with pytest.warns(PegeWarning, match=r"\(RuntimeError: no C\+\+ compiler found\)\.") as caught:
        assert torch.equal(kernel(x), x + 1)
    assert len(caught) == 1
    with torch.no_grad():
        assert not inductor.worth_compiling(torch.zeros(inductor.SMALLEST))


@pytest.mark.parametrize("error", [ValueError("two shapes that do not fit"), torch.OutOfMemoryError("no memory left")])
def test_what_has_nothing_to_do_with_compiling_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(inductor, "_enabled", True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(type(error), match=str(error)):
        inductor.LocalKernel(fails)(torch.zeros(3))
    assert inductor._enabled


# The two paths without the compiler in between: what a kernel sees, and how its result is put back.


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every tensor goes through a kernel, which runs as plain operations; the shapes that kernels see are noted."""
    shapes: list[tuple[int, ...]] = []

    def call(kernel: inductor.LocalKernel, *args: Any) -> Any:
        shapes.append(tuple(args[0].shape))
        return kernel.function(*args)

    monkeypatch.setattr(inductor, "SMALLEST", 0)
    monkeypatch.setattr(inductor, "_enabled", True)
    monkeypatch.setattr(inductor.LocalKernel, "__call__", call)
    return shapes


def test_several_gradients_at_once_are_left_to_plain_operations(seen: list[tuple[int, ...]]) -> None:
    """Autograd makes them by vmap, whose tensors no kernel can read: that was taken for a compiler that does not work."""
    x = torch.randn(4, 6, requires_grad=True)
    y = functional.fake_quantize(x, torch.tensor(0.3), QuantSpec(bits=3))
    gradients = torch.randn(2, 4, 6)
    several = torch.autograd.grad(y, x, gradients, is_grads_batched=True, retain_graph=True)[0]
    assert len(seen) == 1
    torch.testing.assert_close(several[1], torch.autograd.grad(y, x, gradients[1])[0])
    assert len(seen) == 2


CHANNELS_LAST = torch.channels_last
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any, tuple[int, ...] | None]] = {
    "flat": ((2, 3, 4), (), None, (24,)),
    "one element of a scale": ((2, 3, 4), (1, 1, 1), None, (24,)),
    "channels_last": ((2, 3, 4, 5), (), CHANNELS_LAST, (2, 20, 3)),
    "channels_last, one image": ((1, 3, 4, 5), (), CHANNELS_LAST, None),
    "channels_last, three of a kind": ((3, 3, 3, 3), (), CHANNELS_LAST, (3, 9, 3)),
    "channels_last with rows": ((2, 3, 4, 5), (2, 1, 1, 1), CHANNELS_LAST, None),
    "rows": ((4, 3, 2), (4, 1, 1), None, (4, 6)),
    "rows of one": ((4,), (4,), None, None),
    "columns": ((4, 3), (1, 3), None, None),
    "columns of a square": ((3, 3), (1, 3), None, None),
    "a scale with fewer dimensions": ((3, 3), (3,), None, None),
    "more than one to a row": ((2, 3, 4), (2, 3, 1), None, None),
    "not dense": ((2, 3, 8), (), "strided", None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero", [False, True])
def test_what_a_kernel_sees_is_the_same_tensor(layout: str, zero: bool, seen: list[tuple[int, ...]]) -> None:
    shape, scale_shape, memory, expected = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(shape, generator=generator), torch.rand(scale_shape, generator=generator) + 0.1
    x = x[..., ::2] if memory == "strided" else x if memory is None else x.contiguous(memory_format=memory)
    zero_point = torch.randint(-2, 2, scale_shape, generator=generator).float() if zero else None
    options: dict[str, Any] = {"rate": torch.tensor(0.5), "key": KEY, "strength": torch.tensor(1e-2), "zero_point": zero_point}
    found = ran(x, scale, options)
    assert seen == ([] if expected is None else [expected] * 2)
    with inductor.eager_kernels():
        wanted = ran(x, scale, options)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-5, atol=1e-6)
    assert found[0].stride() == x.stride() or memory == "strided"


def ran(x: Tensor, scale: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    a, s = x.detach().requires_grad_(), scale.detach().requires_grad_()
    y = functional.fake_quantize(a, s, QuantSpec(bits=3), **options)
    gradient = torch.linspace(-1, 1, y.numel()).view(y.shape)
    grad_x, grad_s = torch.autograd.grad(y, (a, s), torch.empty_like(y).copy_(gradient))
    return y.detach(), grad_x, grad_s


def test_a_zero_point_of_another_size_is_left_to_plain_operations(seen: list[tuple[int, ...]]) -> None:
    zero_point = torch.zeros(4, 1)
    y = functional.fake_quantize(torch.randn(4, 6), torch.tensor(0.3), QuantSpec(bits=3), zero_point=zero_point)
    assert y.shape == (4, 6)
    assert not seen
