"""Checkpoints: a run that was killed ends like one that was not; what does not belong here is refused, and changes nothing."""

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import CheckpointError, ModelError, PEGEScheduler, QuantPolicy, Rule, fake_quants
from pege_fx.serialization import tensor_tree
from pege_fx.serialization.checkpoint import KIND


def net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.Dropout(),
        nn.Conv2d(width, 2, 2),
    )


X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
Run = tuple[GraphModule, PEGEScheduler, torch.optim.Optimizer]


def made(policy: str | QuantPolicy = "W3A3", steps: int = 10, **options: Any) -> Run:
    gm = pege_fx.prepare(net(), policy, (X,), **options)
    return gm, PEGEScheduler(gm, steps), torch.optim.Adam(pege_fx.parameter_groups(gm, 1e-2))


def train(run: Run, steps: int) -> list[float]:
    gm, scheduler, optimizer = run
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(gm.train()(X + torch.randn_like(X)), torch.rand(6, 2, 2, 2) + random.random() + np.random.rand())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def assert_equal(one: GraphModule, other: GraphModule) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 3, 10])
@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa", "interval", "minmax"])
def test_a_saved_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, method: str, done: int) -> None:
    policy = QuantPolicy.parse("W3A2", method=method)
    whole = made(policy)
    train(whole, done)
    gm, scheduler, optimizer = whole
    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler, optimizer=optimizer)
    losses = train(whole, 4)
    train(other := made(policy, seed=5), 2)  # another seed of the masks: the file's counts
    gm, scheduler, optimizer = other
    assert pege_fx.load(tmp_path / "x", gm, scheduler=scheduler, optimizer=optimizer) is gm
    assert train(other, 4) == losses
    assert_equal(whole[0], gm)
    assert scheduler.state_dict() == whole[1].state_dict()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_other_optimizers_go_on_too(tmp_path: Path, optimizer_class: Any) -> None:
    def run() -> Run:
        gm, scheduler, _ = made()
        return gm, scheduler, optimizer_class(pege_fx.parameter_groups(gm, 1e-2))

    train(whole := run(), 3)
    gm, scheduler, optimizer = whole
    optimizer.param_groups[0]["lr"] = 5e-3
    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler, optimizer=optimizer)
    losses = train(whole, 3)
    other = run()
    pege_fx.load(tmp_path / "x", other[0], scheduler=other[1], optimizer=other[2])
    assert train(other, 3) == losses


def test_a_run_that_was_killed_at_random_moments_ends_like_one_that_was_not(tmp_path: Path, start: Callable[..., Any]) -> None:
    steps = 100
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = start("killed", tmp_path / "whole", steps)
    kills, generator = 0, random.Random(time.time_ns())
    while not (tmp_path / "parts" / "done").exists():
        part = start("killed", tmp_path / "parts", steps)
        if kills < 3:
            while part.exitcode is None and not (tmp_path / "parts" / "state").exists():
                time.sleep(0.002)
            part.join(generator.uniform(0.1, 0.5))
            part.kill()
            kills += 1
        part.join()
        assert part.exitcode in (0, -9)
    whole.join()
    assert whole.exitcode == 0
    one, other = (tensor_tree.read(tmp_path / name / "state", KIND) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert one["extra"] == other["extra"]
    assert one["scheduler"] == other["scheduler"]
    assert torch.equal(one["random"][0]["torch"], other["random"][0]["torch"])
    for index, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][index][name]) for name, value in state.items())


def test_every_random_number_generator_goes_on(tmp_path: Path) -> None:
    gm, scheduler, _ = made()

    def drawn() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler)
    first = drawn()
    pege_fx.load(tmp_path / "x", gm)  # to look at a model: nothing is disturbed
    assert drawn() != first
    pege_fx.load(tmp_path / "x", gm, scheduler=scheduler)
    assert drawn() == first


def test_random_numbers_go_on_with_an_optimizer_alone(tmp_path: Path) -> None:
    gm, _, optimizer = made()
    pege_fx.save(gm, tmp_path / "x", optimizer=optimizer)
    first = torch.rand(())
    pege_fx.load(tmp_path / "x", gm, optimizer=optimizer)
    assert torch.equal(torch.rand(()), first)


# --- what a file is ------------------------------------------------------------------------------------------------------


def test_a_float_model_is_prepared_under_the_stored_policy(tmp_path: Path) -> None:
    gm, scheduler, _ = run = made("W2A3")
    train(run, 2)
    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler)
    loaded = pege_fx.load(tmp_path / "x", net(), example_inputs=(X,))
    assert_equal(loaded, gm)
    assert torch.equal(loaded.eval()(X), gm.eval()(X))


def test_a_checkpoint_describes_itself(tmp_path: Path) -> None:
    gm, scheduler, optimizer = run = made("W2A3")
    train(run, 2)
    extra = {"epoch": 7, "history": [0.5, (1, 2)], "average": torch.ones(2)}
    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler, optimizer=optimizer, extra=extra)
    info = pege_fx.checkpoint_info(tmp_path / "x")
    assert info.model == "Sequential"
    assert info.policy == QuantPolicy.parse("W2A3")
    assert info.fingerprint == gm.meta["plan"].fingerprint
    assert list(info.sites) == list(fake_quants(gm))
    assert info.versions["torch"] == torch.__version__
    assert info.scheduler == scheduler.state_dict()
    assert info.extra["history"] == [0.5, (1, 2)]
    assert torch.equal(info.extra["average"], torch.ones(2))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.11 warns of itself
def test_a_wrapped_or_compiled_model_saves_what_is_inside(tmp_path: Path) -> None:
    gm, *_ = made()
    average = torch.optim.swa_utils.AveragedModel(gm)
    for i, wrapped in enumerate((average, nn.Sequential(gm), torch.compile(gm))):
        pege_fx.save(wrapped, tmp_path / str(i))
        assert_equal(pege_fx.load(tmp_path / str(i), made()[0]), gm)


def test_tied_weights_and_half_types(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.embedding(x))
            return out

    tokens = torch.arange(5)
    gm = pege_fx.prepare(Tied(), "W4A4", (tokens,)).to(torch.bfloat16)
    pege_fx.save(gm, tmp_path / "x")
    other = pege_fx.load(tmp_path / "x", pege_fx.prepare(Tied(), "W4A4", (tokens,)).to(torch.bfloat16))
    assert_equal(other, gm)
    assert torch.equal(other.eval()(tokens), gm.eval()(tokens))


# --- what does not belong here ----------------------------------------------------------------------------------------------


def refused(path: Path, words: str, run: Run, *, with_optimizer: bool = True) -> None:
    """Loading raises with these words, and the run it was for is as it was."""
    gm, scheduler, optimizer = run
    before = copy.deepcopy((gm.state_dict(), scheduler.state_dict(), optimizer.state_dict()))
    generator = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=words):
        pege_fx.load(path, gm, scheduler=scheduler, optimizer=optimizer if with_optimizer else None)
    assert all(torch.equal(value, gm.state_dict()[name]) for name, value in before[0].items())
    assert before[1] == scheduler.state_dict()
    assert str(before[2]) == str(optimizer.state_dict())
    assert torch.equal(generator, torch.get_rng_state())


def test_a_checkpoint_of_another_policy_graph_schedule_or_optimizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    gm, scheduler, optimizer = run = made("W3A3")
    train(run, 1)
    pege_fx.save(gm, path, scheduler=scheduler, optimizer=optimizer)
    refused(path, r"another graph or policy: Sequential, not this Sequential[\s\S]*bits=3.*in the file, .*bits=4", made("W4A3"))
    refused(path, r"another length: total_steps is 10 there and 20 here", made("W3A3", steps=20))
    refused(path, r"1\.bias is in the file only[\s\S]*same batch_norm mode", made("W3A3", batch_norm="freeze"))
    gm, scheduler, _ = made("W3A3")
    refused(path, r"an optimizer of other parameters", (gm, scheduler, torch.optim.Adam(gm.parameters())))
    wider = pege_fx.prepare(net(8), "W3A3", (X,))
    refused(
        path,
        r"0\.weight has shape \(4, 3, 3, 3\) there",
        (wider, PEGEScheduler(wider, 10), torch.optim.Adam(wider.parameters())),
    )
    other = pege_fx.prepare(nn.Sequential(nn.Linear(2, 2)), "W3A3")
    refused(
        path,
        r"another graph or policy[\s\S]*not there here",
        (other, PEGEScheduler(other, 10), torch.optim.Adam(other.parameters())),
    )
    with pytest.raises(CheckpointError, match=r"belongs to another graph or policy|is of another model"):
        pege_fx.load(path, nn.Sequential(nn.Linear(2, 2)))


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(x)
        return out


def test_the_same_sites_read_by_others_are_another_graph(tmp_path: Path) -> None:
    one, other = (
        pege_fx.prepare(Fork(), QuantPolicy((Rule(weight="4"), Rule(match=path, input="4"))), (torch.randn(2, 4),))
        for path in ("a", "b")
    )
    assert set(fake_quants(one)) == set(fake_quants(other))
    pege_fx.save(one, tmp_path / "x")
    with pytest.raises(CheckpointError, match="another graph or policy"):
        pege_fx.load(tmp_path / "x", other)


def test_a_state_that_was_not_saved_can_not_be_loaded(tmp_path: Path) -> None:
    pege_fx.save(made()[0], tmp_path / "x")
    refused(tmp_path / "x", "saved without an optimizer: load it without", made())
    refused(tmp_path / "x", "saved without a scheduler: load it without", made(), with_optimizer=False)


def test_a_broken_checkpoint_is_refused_and_the_one_before_it_loads(tmp_path: Path) -> None:
    path = tmp_path / "x"
    gm, scheduler, optimizer = run = made()
    for _ in range(2):
        train(run, 1)
        pege_fx.save(gm, path, scheduler=scheduler, optimizer=optimizer)
    path.write_bytes(path.read_bytes()[:-7])
    refused(path, r"truncated[\s\S]*the one before it is .*x\.previous", made())
    before = pege_fx.newest(path)
    assert before == tmp_path / "x.previous"
    gm, scheduler, optimizer = made()
    pege_fx.load(before, gm, scheduler=scheduler, optimizer=optimizer)
    assert scheduler.t == 1
    before.write_bytes(b"")
    with pytest.raises(CheckpointError, match="x is truncated"):
        pege_fx.newest(path)
    assert pege_fx.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("number", [99, 0])
def test_another_format_is_named(number: int, tmp_path: Path) -> None:
    tensor_tree.write({"format": number}, tmp_path / "x", KIND)
    with pytest.raises(CheckpointError, match=f"has format {number}, this version reads 1: upgrade pege_fx"):
        pege_fx.load(tmp_path / "x", net())


def test_a_file_with_parts_missing_is_refused(tmp_path: Path) -> None:
    gm, scheduler, optimizer = made()
    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler, optimizer=optimizer)
    tree = tensor_tree.read(tmp_path / "x", KIND)
    for name in set(tree) - {"format"}:
        tensor_tree.write({key: value for key, value in tree.items() if key != name}, tmp_path / "y", KIND)
        refused(tmp_path / "y", f"is not complete: {name} missing", made())
        if name != "extra":
            tensor_tree.write(tree | {name: "text"}, tmp_path / "y", KIND)
            refused(tmp_path / "y", f"is not complete: {name} missing, or of another kind", made())
    tensor_tree.write(tree | {"graph": {}}, tmp_path / "y", KIND)
    refused(tmp_path / "y", "its graph has no 'model'", made())
    tensor_tree.write([1, 2], tmp_path / "y", KIND)
    refused(tmp_path / "y", "has format None", made())


def test_the_state_of_another_kind_of_optimizer_is_refused(tmp_path: Path) -> None:
    gm, scheduler, optimizer = made()
    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler, optimizer=optimizer)
    gm, scheduler, _ = made()
    sgd = torch.optim.SGD(pege_fx.parameter_groups(gm, 1e-2))
    refused(tmp_path / "x", "holds the state of Adam, not of SGD: make the same optimizer", (gm, scheduler, sgd))


def test_groups_of_an_optimizer_are_the_same_in_the_same_order(tmp_path: Path) -> None:
    orders: list[Run] = []
    for step in (1, -1):
        gm, scheduler, _ = made()
        orders.append((gm, scheduler, torch.optim.Adam(pege_fx.parameter_groups(gm, 1e-2)[::step])))
    for (gm, scheduler, optimizer), other in (orders, orders[::-1]):
        pege_fx.save(gm, tmp_path / "x", scheduler=scheduler, optimizer=optimizer)
        refused(tmp_path / "x", r"an optimizer of other parameters: groups of \[.*\] there, of \[.*\] here", other)


def test_values_of_another_kind_are_refused(tmp_path: Path) -> None:
    gm, scheduler, optimizer = run = made()
    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler, optimizer=optimizer)
    tree = tensor_tree.read(tmp_path / "x", KIND)
    whole = tree | {"model": tree["model"] | {"0.weight": tree["model"]["0.weight"].to(torch.int32)}}
    tensor_tree.write(whole, tmp_path / "y", KIND)
    refused(tmp_path / "y", r"0\.weight is torch\.int32 there and torch\.float32 here", run)
    for wrong in (None, "text", 2**70):
        tensor_tree.write(tree | {"masks": dict.fromkeys(tree["masks"], wrong)}, tmp_path / "y", KIND)
        with pytest.raises(CheckpointError, match="is not what save wrote"):
            pege_fx.load(tmp_path / "y", gm)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a mask of text": (lambda tree: tree["masks"].update(dict.fromkeys(tree["masks"], "x")), "is not what save wrote"),
    "a mask of two numbers": (lambda tree: tree["masks"].update({[*tree["masks"]][-1]: [1, 2]}), "is not what save wrote"),
    "a mask of a fraction": (lambda tree: tree["masks"].update({[*tree["masks"]][-1]: 1.5}), "is not what save wrote"),
    "half of torch's generator": (
        lambda tree: tree["random"][0].update(torch=torch.zeros(9, dtype=torch.uint8)),
        "no state of random",
    ),
    "python's generator": (lambda tree: tree["random"][0].update(python=(3, (1, 2), None)), "no state of random"),
    "numpy's generator": (
        lambda tree: tree["random"][0].update(numpy=("MT19937", torch.ones(3), 1, 0, 0.0)),
        "no state of random",
    ),
    "no generator": (lambda tree: tree["random"][0].pop("python"), "no state of random"),
    "a number for a parameter": (lambda tree: tree["optimizer"]["state"].update({0: 3}), "state 0 belongs to none"),
    "a parameter too many": (lambda tree: tree["optimizer"]["state"].update({99: {}}), "state 99 belongs to none"),
    "another shape": (
        lambda tree: tree["optimizer"]["state"][0].update(exp_avg=torch.ones(3, 1)),
        r"exp_avg of the optimizer has shape \(3, 1\), not \(4, 3, 3, 3\)",
    ),
    "a rate of text": (
        lambda tree: tree["optimizer"]["param_groups"][0].update(lr="fast"),
        "lr of the optimizer's group 0 is 'fast'",
    ),
    "other parameters": (
        lambda tree: tree["optimizer"]["param_groups"][0].update(params=[7]),
        "params of the optimizer's group 0",
    ),
    "no groups": (lambda tree: tree["optimizer"].pop("param_groups"), "is not what save wrote"),
    "a position": (lambda tree: tree["scheduler"].update(t=99), "t=99 is no position"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_file_says_wrongly_is_found_before_anything_is_changed(tmp_path: Path, name: str) -> None:
    gm, scheduler, optimizer = run = made()
    train(run, 2)
    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler, optimizer=optimizer)
    tree = tensor_tree.read(tmp_path / "x", KIND)
    change, words = CHANGES[name]
    change(tree)
    tensor_tree.write(tree, tmp_path / "y", KIND)
    refused(tmp_path / "y", words, made())


def test_options_that_another_torch_does_not_have_stay_as_they_are_here(tmp_path: Path) -> None:
    gm, scheduler, optimizer = run = made()
    train(run, 1)
    pege_fx.save(gm, tmp_path / "x", scheduler=scheduler, optimizer=optimizer)
    tree = tensor_tree.read(tmp_path / "x", KIND)
    for group in tree["optimizer"]["param_groups"]:
        del group["weight_decay"]
    tensor_tree.write(tree, tmp_path / "y", KIND)
    gm, scheduler, optimizer = run = made()
    pege_fx.load(tmp_path / "y", gm, scheduler=scheduler, optimizer=optimizer)
    train(run, 1)


def test_models_that_were_not_prepared_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="was not prepared"):
        pege_fx.save(net(), tmp_path / "x")
    with pytest.raises(ModelError, match="was not prepared"):
        pege_fx.save(pege_fx.convert(pege_fx.prepare(net(), "W3A3", (X,))), tmp_path / "x")


@pytest.mark.filterwarnings("ignore:nothing is quantized")
def test_a_baseline_in_float_is_saved_and_resumed_by_the_same_code(tmp_path: Path) -> None:
    run = made("W32A32")
    train(run, 2)
    pege_fx.save(run[0], tmp_path / "state", scheduler=run[1], optimizer=run[2])
    losses, other = train(run, 2), made("W32A32")
    pege_fx.load(tmp_path / "state", other[0], scheduler=other[1], optimizer=other[2])
    assert train(other, 2) == losses
    with pytest.raises(ModelError, match="was not prepared"):
        pege_fx.save(pege_fx.convert(pege_fx.prepare(net(), "W3A3", (X,)).eval()), tmp_path / "deployed")


def test_a_file_of_when_one_value_per_tensor_was_0d_still_loads_and_goes_on(tmp_path: Path) -> None:
    def as_before(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: as_before(part, str(key)) for key, part in value.items()}
        is_single = isinstance(value, Tensor) and value.shape == (1,)
        return value.reshape(()) if is_single else value

    run = made()
    train(run, 2)
    pege_fx.save(run[0], tmp_path / "now", scheduler=run[1], optimizer=run[2])
    tree = tensor_tree.read(tmp_path / "now", KIND)
    before = tree | {name: as_before(tree[name]) for name in ("model", "optimizer")}
    assert any(value.ndim == 0 and name.endswith("method.scale") for name, value in before["model"].items())
    tensor_tree.write(before, tmp_path / "before", KIND)
    losses, other = train(run, 2), made()
    pege_fx.load(tmp_path / "before", other[0], scheduler=other[1], optimizer=other[2])
    assert train(other, 2) == losses
    again = made()[0]
    again.load_state_dict(before["model"])  # a plain state of torch.save, too
    assert all(torch.equal(value, tree["model"][name]) for name, value in again.state_dict().items())
