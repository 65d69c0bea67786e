"""What only a GPU shows: the same masks as on a CPU, compiled steps, CUDA graphs. Skipped where there is none."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantSpec, functional, kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Net(nn.Module):
    """Two folded convolutions, a residual, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def prepared(seed: int = 0) -> torch.fx.GraphModule:
    torch.manual_seed(seed)
    return pege_fx.prepare(Net(), "W2A2", (torch.randn(8, 3, 16, 16),)).cuda()


@pytest.mark.parametrize("shape", [(1000,), (4, 3, 17, 5), (2_000_003,)])
def test_masks_are_the_same_on_both_devices_and_compiled(shape: tuple[int, ...]) -> None:
    key = torch.tensor(functional.site_key(3, "site"), dtype=torch.int32)
    here = functional.uniform(key, shape)
    there = functional.uniform(key.cuda(), shape)
    compiled = torch.compile(functional.uniform, fullgraph=True)(key.cuda(), shape)
    assert torch.equal(here, there.cpu())
    assert torch.equal(there, compiled)


@pytest.mark.parametrize("estimator", ["ste", "ewgs", "pege", "pege-relative", "pege-share"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_those_of_the_cpu(estimator: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = QuantSpec(bits=3, estimator=estimator)
    key, rate = torch.tensor(12345, dtype=torch.int32), torch.tensor(0.6)
    x, grad = torch.randn(8, 4, 9, 9).to(dtype), torch.randn(8, 4, 9, 9).to(dtype)
    scale = torch.rand(1, 4, 1, 1) + 0.1

    def run(device: str) -> tuple[Tensor, Tensor, Tensor]:
        a = x.detach().to(device).requires_grad_()
        s = scale.detach().to(device).requires_grad_()
        y = functional.fake_quantize(
            a, s, spec, rate=rate.to(device), key=key.to(device), strength=torch.tensor(1e-2, device=device)
        )
        y.backward(grad.to(device))
        assert a.grad is not None
        assert s.grad is not None
        return y.detach().cpu(), a.grad.cpu(), s.grad.cpu()

    here, there = run("cpu"), run("cuda")
    assert torch.equal(here[0], there[0])
    torch.testing.assert_close(here[1], there[1])
    torch.testing.assert_close(here[2], there[2], rtol=1e-4, atol=1e-4)


# For the kernels written by hand: shape, shape of the scale, layout.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.memory_format]] = {
    "flat": ((3_000_001,), (), torch.contiguous_format),
    "rows": ((512, 64, 3, 3), (512, 1, 1, 1), torch.contiguous_format),
    "long rows": ((7, 100_003), (7, 1), torch.contiguous_format),
    "channels_last": ((32, 64, 28, 28), (), torch.channels_last),
    "channels_last, three channels": ((32, 3, 57, 61), (), torch.channels_last),
    "channels_last with rows": ((512, 64, 3, 3), (512, 1, 1, 1), torch.channels_last),
    "channels_last_3d": ((4, 16, 8, 14, 14), (), torch.channels_last_3d),
}


def served(x: Tensor, scale: Tensor, spec: QuantSpec, options: dict[str, Any]) -> list[Tensor]:
    """y and the gradients, by the kernels written by hand; fails where they do not serve, or warn."""
    triton_kernels = pytest.importorskip("pege_fx.kernels.triton_kernels")
    strength = torch.tensor(1e-2, device="cuda")
    grad = torch.randn(x.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(x.dtype)
    zero_point, bounds = options.get("zero_point"), spec.bounds
    y = triton_kernels.forward(x, scale, zero_point, options.get("rate"), options.get("key"), *bounds)
    assert y is not None
    assert triton_kernels.backward(spec.estimator, grad, x, y, scale, zero_point, strength, *bounds) is not None
    return ran(x, scale, spec, options, grad, strength)


def ran(x: Tensor, scale: Tensor, spec: QuantSpec, options: dict[str, Any], grad: Tensor, strength: Tensor) -> list[Tensor]:
    a, s = x.detach().requires_grad_(), scale.detach().requires_grad_()
    y = functional.fake_quantize(a, s, spec, strength=strength, **options)
    found = [y.detach(), *torch.autograd.grad(y, (a, s), grad)]
    with kernels.eager_kernels():
        y = functional.fake_quantize(a, s, spec, strength=strength, **options)
        return [*found, y.detach(), *torch.autograd.grad(y, (a, s), grad)]


def bits_of(x: Tensor) -> Tensor:
    """What can be compared bit for bit, with the sign of zeros; all NaN are one."""
    return x.float().view(torch.int32).masked_fill(x.isnan(), 0x7FC00000)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["ste", "ewgs", "pege", "pege-relative", "pege-share"])
def test_kernels_written_by_hand_equal_plain_operations(layout: str, dtype: torch.dtype, estimator: str) -> None:
    shape, scale_shape, memory = LAYOUTS[layout]
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory)
    scale = torch.rand(scale_shape, device="cuda") + 0.1
    rate, key = torch.tensor(0.5, device="cuda"), torch.tensor([-7, 2**31 - 1000], dtype=torch.int32, device="cuda")
    options: tuple[dict[str, Any], ...] = ({}, {"rate": rate, "key": key}, {"rate": rate, "key": key[0]})
    for given in (*options, {"zero_point": torch.full_like(scale, -1.0)}):
        y, grad_x, grad_scale, *wanted = served(x, scale, QuantSpec(bits=3, estimator=estimator), given)
        assert torch.equal(bits_of(y), bits_of(wanted[0]))
        assert y.stride() == grad_x.stride() == x.stride()
        torch.testing.assert_close(grad_x, wanted[1])
        size = wanted[2].abs().max() + x.numel() ** 0.5 / scale.numel() ** 0.5  # it is a sum of so many random numbers
        assert (grad_scale - wanted[2]).abs().max() <= 1e-4 * size


@pytest.mark.parametrize("scale", [1.0, -1.0, 1 / 3, 2.0**-59, 2.0**-100, 1e-45, 0.0, 2.0**59, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("signed", [True, False])
def test_special_values_are_the_same_bit_for_bit_on_the_device(scale: float, signed: bool) -> None:
    torch.manual_seed(0)
    every_half = torch.arange(2**16, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.bfloat16).float()
    ties = (torch.arange(-300, 300, device="cuda") + 0.5) * scale * (1 + torch.arange(-2, 3, device="cuda")[:, None] * 2.0**-23)
    bits = torch.randint(-(2**31), 2**31, (2**20,), dtype=torch.int32, device="cuda").view(torch.float32)
    x, s = torch.cat([every_half, ties.flatten(), bits]), torch.tensor(scale, device="cuda")
    for zero in (None, 0.0, -1.5, -(2.0**23)):
        zero_point = None if zero is None else torch.tensor(zero, device="cuda")
        y, *_, wanted, _, _ = served(x, s, QuantSpec(bits=8, signed=signed), {"zero_point": zero_point})
        assert torch.equal(bits_of(y), bits_of(wanted))


def test_ties_are_where_a_correctly_rounded_division_has_them() -> None:
    torch.manual_seed(0)
    halves = torch.randint(-130, 130, (4096, 4096), device="cuda") + 0.5
    scale = (torch.rand(4096, 1, device="cuda") + 1) * 2.0 ** torch.randint(-50, 50, (4096, 1), device="cuda")
    x = halves * scale * (1 + torch.randint(-2, 3, halves.shape, device="cuda") * 2.0**-23)
    y, *_, wanted, _, _ = served(x, scale, QuantSpec(bits=8), {})
    assert torch.equal(bits_of(y), bits_of(wanted))


def test_eager_kernels_runs_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernels = pytest.importorskip("pege_fx.kernels.triton_kernels")
    calls: list[object] = []
    monkeypatch.setattr(triton_kernels, "forward", lambda *_: calls.append(None))
    x, scale = torch.randn(10, device="cuda"), torch.tensor(0.3, device="cuda")
    with kernels.eager_kernels():
        functional.fake_quantize(x, scale, QuantSpec(bits=2))
    assert not calls
    functional.fake_quantize(x, scale, QuantSpec(bits=2))
    assert len(calls) == 1


def test_gradients_captured_in_a_cuda_graph() -> None:
    """No kernel waits for the device, and a replay sees the p of that moment."""
    x, scale = torch.randn(64, 300, device="cuda", requires_grad=True), torch.tensor(0.3, device="cuda", requires_grad=True)
    rate, key = torch.tensor(0.5, device="cuda"), torch.tensor(7, dtype=torch.int32, device="cuda")

    def step() -> tuple[Tensor, ...]:
        y = functional.fake_quantize(x, scale, QuantSpec(bits=3), rate=rate, key=key, strength=torch.zeros_like(rate))
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, scale))

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for value in (0.2, 0.9):
            rate.fill_(value)
            graph.replay()
            for found, wanted in zip(captured, step(), strict=True):
                torch.testing.assert_close(found, wanted)
    torch.cuda.current_stream().wait_stream(stream)


def launches(gm: nn.Module, x: Tensor) -> int:
    """How many kernels a training step runs."""
    for _ in range(2):
        gm(x).square().mean().backward()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gm(x).square().mean().backward()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type is torch.autograd.DeviceType.CUDA)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # the profiler's own
def test_a_site_launches_few_kernels() -> None:
    """Two written by hand, and what a scale, its gradient and a key need."""
    x, gm = torch.randn(32, 3, 16, 16, device="cuda"), prepared().train()
    PEGEScheduler(gm, 10, Constant(0.5), Constant(0.0), Constant(0.0))
    plain = launches(Net().cuda().train(), x)
    if not plain:
        pytest.skip("the profiler does not see the device")
    assert launches(gm, x) - plain <= 25 * len(pege_fx.fake_quants(gm))


# The compiler of torch 2.11 uses what torch 2.11 deprecates, and recommends TensorFloat32.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")
def test_a_compiled_step_trains_like_an_eager_one_and_never_recompiles() -> None:
    eager = prepared()
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True)
    schedules = [PEGEScheduler(gm, total_steps=20) for gm in (eager, traced)]
    optimizers = [torch.optim.SGD(gm.parameters(), lr=1e-3) for gm in (eager, traced)]
    for step in range(8):
        x = torch.randn(32, 3, 16, 16, device="cuda")
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            outputs = [eager(x), compiled(x)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
        for output, optimizer, schedule in zip(outputs, optimizers, schedules, strict=True):
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def capture(gm: torch.fx.GraphModule, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A forward pass as a CUDA graph, and the tensor that its replays write."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            gm(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = gm(x)
    return graph, captured


def test_a_captured_cuda_graph_follows_the_scheduler() -> None:
    gm = prepared().train()
    scheduler = PEGEScheduler(gm, 10, Constant(0.5), Constant(0.0), Constant(0.0))
    x = torch.randn(8, 3, 16, 16, device="cuda")
    graph, captured = capture(gm, x)
    seen = []
    for _ in range(3):
        scheduler.step()
        graph.replay()
        seen.append(captured.clone())
        with torch.no_grad():
            torch.testing.assert_close(seen[-1], gm(x))
    assert not torch.equal(seen[0], seen[1])


def test_a_captured_evaluation_follows_the_weights() -> None:
    gm = prepared().eval()
    x = torch.randn(8, 3, 16, 16, device="cuda")
    graph, captured = capture(gm, x)
    with torch.no_grad():
        gm.get_parameter("conv2.weight").mul_(-1)
        graph.replay()
        assert torch.equal(captured, gm(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")
@pytest.mark.parametrize("amp", [False, True])
def test_a_recorded_step_trains_like_an_eager_one(amp: bool) -> None:
    """Compiled, captured as one CUDA graph with its optimizer, and replayed: float64 follows eager training closely."""
    eager = prepared().double().to(memory_format=torch.channels_last).train()
    recorded = copy.deepcopy(eager)
    compiled = torch.compile(recorded, fullgraph=True)
    x = torch.randn(6, 16, 3, 16, 16, device="cuda", dtype=torch.float64).flatten(0, 1).to(memory_format=torch.channels_last)
    batches, batch = x.split(16), torch.empty_like(x[:16])
    adams = [torch.optim.Adam(gm.parameters(), lr=1e-3, capturable=True) for gm in (eager, recorded)]
    schedules = [PEGEScheduler(gm, total_steps=6) for gm in (eager, recorded)]

    def step(run: nn.Module, adam: torch.optim.Optimizer, images: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            loss = run(images).double().square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for number, images in enumerate(batches):
            if number == 3:
                with torch.cuda.graph(graph, stream=stream):
                    step(compiled, adams[1], batch)
            batch.copy_(images)
            step(eager, adams[0], images)
            graph.replay() if number >= 3 else step(compiled, adams[1], batch)
            for schedule in schedules:
                schedule.step()
    stream.synchronize()
    for (name, wanted), value in zip(eager.named_parameters(), recorded.parameters(), strict=True):
        if name.endswith(".bias") and name.startswith("conv"):
            continue  # in front of a BatchNorm its gradient is rounding
        change = wanted - prepared().double().get_parameter(name)
        assert (value - wanted).norm() <= (0.2 if amp else 1e-6) * change.norm(), name


@pytest.mark.parametrize("method", ["lsq", "pact", "minmax"])
def test_a_converted_model_gives_the_same_answers(method: str) -> None:
    torch.manual_seed(1)
    net = Net()
    gm = pege_fx.prepare(net, pege_fx.QuantPolicy.parse("W4A4", method=method), (torch.randn(8, 3, 16, 16),)).cuda().eval()
    x = torch.randn(16, 3, 16, 16, device="cuda")
    with torch.no_grad():
        assert torch.equal(pege_fx.convert(gm)(x), gm(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_with_scales_in_float32(dtype: torch.dtype) -> None:
    gm = prepared().to(memory_format=torch.channels_last)
    scheduler = PEGEScheduler(gm, 10)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, 1e-3, 1e-5))
    for _ in range(3):
        x = torch.randn(32, 3, 16, 16, device="cuda").to(memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=dtype):
            loss = gm(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
    assert torch.isfinite(loss)
    assert all(fq.method.scale.dtype is torch.float32 for fq in pege_fx.fake_quants(gm).values())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_scheduler_does_not_wait_for_the_device() -> None:
    scheduler = PEGEScheduler(prepared(), 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scheduler.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
