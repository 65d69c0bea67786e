"""What a forward enters, sets and asks of modes holds in each call, also where nothing changed by it when it was traced."""

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pege_fx
from pege_fx import QuantPolicy, Rule
from pege_fx.passes.capture.contexts import surroundings

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
FLOAT = QuantPolicy((Rule(weight=None, input=None),))
X = torch.linspace(-1.0, 1.0, 32).view(4, 8)
Body = Callable[["Inner", Tensor], Tensor]
Context = Callable[[], AbstractContextManager[Any]]


class Inner(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Net(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.head = nn.Linear(8, 8), Inner(body), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.first(x)).float())  # type: ignore[no-any-return]


def block(make: Context) -> Body:
    def body(m: Inner, x: Tensor) -> Tensor:
        with make():
            y: Tensor = m.a(x)
        return y

    return body


def question(ask: Callable[[], bool]) -> Body:
    return lambda m, x: m.a(x) if ask() else m.b(x)


@torch.no_grad()
def decorated(m: Inner, x: Tensor) -> Tensor:
    return m.a(x)  # type: ignore[no-any-return]


def by_stack(m: Inner, x: Tensor) -> Tensor:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        return m.a(x.float())  # type: ignore[no-any-return]


def by_call(m: Inner, x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    try:
        return m.a(x)  # type: ignore[no-any-return]
    finally:
        torch.set_grad_enabled(before)


def seeded(m: Inner, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        return m.a(x) * torch.rand(8)  # type: ignore[no-any-return]


def autocast_off(m: Inner, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.a(x.float())  # type: ignore[no-any-return]


BODIES: dict[str, Body] = {
    "no_grad": block(torch.no_grad),
    "enable_grad": block(torch.enable_grad),
    "set_grad_enabled": block(lambda: torch.set_grad_enabled(True)),
    "inference_mode off": block(lambda: torch.inference_mode(False)),
    "autocast on": block(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast off": autocast_off,
    "autocast of another device": block(lambda: torch.autocast("cuda", enabled=False)),
    "attention kernel": block(lambda: sdpa_kernel(SDPBackend.MATH)),
    "cudnn": block(lambda: torch.backends.cudnn.flags(enabled=False)),
    "saved tensors": block(torch.autograd.graph.save_on_cpu),
    "decorated": decorated,
    "by a stack": by_stack,
    "by a call": by_call,
    "seeded": seeded,
    "grad?": question(lambda: torch.is_grad_enabled()),
    "inference mode?": question(lambda: torch.is_inference_mode_enabled()),
    "autocast?": question(lambda: torch.is_autocast_enabled("cpu")),
    "deterministic?": question(lambda: torch.are_deterministic_algorithms_enabled()),
    "autocast dtype?": lambda m, x: m.a(x).to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype),
}
AROUND: dict[str, Context] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("prepared_in", ["", "no_grad", "autocast"])
def test_a_context_within_forward_means_in_each_call_what_it_means(body: str, prepared_in: str) -> None:
    model = Net(BODIES[body])
    with AROUND[prepared_in]():
        gm = pege_fx.prepare(model, FLOAT, (X,))
    for around in AROUND.values():
        with around():
            try:
                expected = model(X)
            except RuntimeError as error:  # within inference mode no block ends it for the tensors that come in
                with pytest.raises(RuntimeError, match=str(error)[:40]):
                    gm(X)
                continue
            found = gm(X)
        torch.testing.assert_close(found, expected)
        assert found.requires_grad == expected.requires_grad


WRITTEN_DOWN = {"autocast off", "autocast of another device", "by a stack"}  # switched off: a region of the graph


@pytest.mark.parametrize("body", sorted(BODIES.keys() - WRITTEN_DOWN))
def test_the_smallest_module_stays_python_and_what_it_uses_is_named(body: str) -> None:
    with pytest.warns(pege_fx.PegeWarning, match=r"inner stays Python: ContextError: it (uses|does one) [\w ]*(torch\.)?\w+"):
        gm = pege_fx.prepare(Net(BODIES[body]), "W8A8", (X,))
    assert {"first.weight_fq", "head.weight_fq"} <= {*pege_fx.fake_quants(gm)}


class WithoutAutocast(nn.Module):
    """Keeps a product of activations, and a layer, out of autocast; the type of its devices is asked for in the outer block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.autocast("cpu", enabled=False):
            with torch.autocast(x.device.type, enabled=False):
                y = y.float() @ y.float().t()
            z = self.a(x.float())
        return self.b(y @ z)  # type: ignore[no-any-return]


def assert_same_in_and_outside_of_autocast(model: nn.Module, made: Any, x: Tensor) -> None:
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected, found = model(x), made(x)
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_where_autocast_is_switched_off_is_a_region_of_the_graph_in_all_its_forms() -> None:
    model, x = WithoutAutocast(), torch.randn(8, 8)
    gm = pege_fx.prepare(model, FLOAT, (x,))
    assert pege_fx.plan_of(gm).captures[0].rung == "specialised"
    forms = [gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))]
    if torch.torch_version.TorchVersion(torch.__version__) >= (
        2,
        12,
    ):  # 2.11's compiler does not know torch.set_autocast_enabled
        forms.append(torch.compile(gm, fullgraph=True, backend="aot_eager"))
    for made in forms:
        assert_same_in_and_outside_of_autocast(model, made, x)
    quantized = pege_fx.prepare(model, "W8A8", (x,)).eval()
    assert [operation.function for operation in pege_fx.plan_of(quantized).operations].count("matmul") == 2
    assert_same_in_and_outside_of_autocast(quantized, pege_fx.convert(quantized), x)


@pytest.mark.parametrize("copied", [lambda gm: gm, copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_a_call_that_fails_in_such_a_region_leaves_autocast_on(copied: Callable[[Any], Any]) -> None:
    made = copied(pege_fx.prepare(WithoutAutocast(), FLOAT, (torch.randn(8, 8),)))
    made.a.weight.data = made.a.weight.data.double()  # takes half types within autocast, and no float outside of it
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype"):
            made(torch.randn(8, 8))
        assert torch.is_autocast_enabled("cpu")


def test_such_a_region_is_stored(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), Inner(autocast_off)), torch.randn(8, 8)
    deployed = pege_fx.convert(pege_fx.prepare(model, "W8A8", (x,)))
    pege_fx.save_deployed(deployed, tmp_path / "model.safetensors")
    assert_same_in_and_outside_of_autocast(deployed, pege_fx.load_deployed(tmp_path / "model.safetensors"), x)


def test_another_thread_enters_contexts_while_a_model_is_traced() -> None:
    results: list[Any] = []

    def elsewhere(m: Inner, x: Tensor) -> Tensor:
        def ask() -> None:
            with torch.no_grad():
                results.append(torch.is_grad_enabled())

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return m.a(x)  # type: ignore[no-any-return]

    pege_fx.prepare(Net(elsewhere), FLOAT, (X,), check=False)
    assert results
    assert not any(results)


def test_tracing_leaves_torch_as_it_was() -> None:
    names = vars(torch).copy()
    before = surroundings(), torch.no_grad.__enter__, torch.autocast.__enter__
    pege_fx.prepare(Net(BODIES["no_grad"]), FLOAT, (X,))
    assert before == (surroundings(), torch.no_grad.__enter__, torch.autocast.__enter__)
    assert all(vars(torch)[name] is value for name, value in names.items())


class Asking(nn.Module):
    """Asks for modes, and does the same whatever the answer: as models do that checkpoint on request."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.checkpointing = nn.Linear(8, 3), False

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.checkpointing:
            x = x * 2
        return self.layer(x)  # type: ignore[no-any-return]


def test_a_question_that_decides_nothing_is_no_reason_to_stay_python() -> None:
    gm = pege_fx.prepare(Asking(), "W8A8", (X,))
    assert pege_fx.plan_of(gm).captures[0].rung == "symbolic"


class Frequencies(nn.Module):
    """Has no parameters, and keeps its arithmetic out of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return x.float().cos()
        return x.cos()


def test_what_has_no_parameters_is_kept_as_one_node() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Frequencies(), nn.Linear(8, 3))
    gm = pege_fx.prepare(model, FLOAT, (X,))
    assert [note.rung for note in pege_fx.plan_of(gm).captures] == ["symbolic", "leaf"]
    with torch.autocast("cpu", torch.bfloat16):
        assert gm(X).dtype is model(X).dtype is torch.bfloat16


@pytest.mark.parametrize("around", AROUND)
def test_what_is_prepared_and_converted_within_a_context_trains_and_loads_outside(around: str) -> None:
    torch.manual_seed(0)
    with AROUND[around]():
        gm = pege_fx.prepare(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), "W8A8", (X.clone(),)
        )
        deployed = pege_fx.convert(gm)
    assert not any(value.is_inference() for made in (gm, deployed) for value in (*made.parameters(), *made.buffers()))
    gm.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in gm.parameters())
    deployed.load_state_dict(deployed.state_dict())
