"""Checkpoints: everything that a run needs to go on as if nothing had happened, in one safe and self-describing file."""

import operator
import os
import platform
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pege_fx._utils.collectives import gathered, laid_out_as, on_first_rank, rank_and_size, whole
from pege_fx._utils.files import path_of
from pege_fx.api import prepare
from pege_fx.errors import CheckpointError, PegeError, PolicyError
from pege_fx.modules.fake_quant import fake_quants
from pege_fx.modules.stages import check_stage, graph_inside, graph_of, unwrapped
from pege_fx.policy.rules import QuantPolicy
from pege_fx.serialization import tensor_tree
from pege_fx.serialization.compatibility import (
    CheckpointInfo,
    check_entries,
    check_optimizer,
    check_sites,
    check_tensors,
    described,
)
from pege_fx.training.scheduler import PEGEScheduler, plan_of

KIND = "pege_fx checkpoint"
FORMAT = 1
_PARTS: dict[str, type | tuple[type, ...]] = {
    "graph": dict,
    "sites": dict,
    "masks": dict,
    "model": dict,
    "versions": dict,
    "scheduler": (dict, NoneType),
    "optimizer": (dict, NoneType),
    "random": list,
    "extra": object,
}


def save(
    gm: nn.Module,
    path: str | os.PathLike[str],
    *,
    scheduler: PEGEScheduler | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Any = None,
) -> None:
    """Write a checkpoint: a safetensors file with a JSON header, replaced at once or not at all.

    In it: weights and buffers, policy, graph fingerprint, versions, the masks' keys and counters, the states of scheduler
    and optimizer, and of the random number generators (torch, CUDA, Python, NumPy). The checkpoint that it replaces stays
    as ``<path>.previous``. With ``torch.distributed``, every rank calls it; the first one writes, sharded tensors whole.

    Args:
        gm: a prepared model, or one wrapped in ``DistributedDataParallel`` or compiled.
        extra: anything more, of tensors, numbers, text, None, and dicts, lists and tuples of them: the epoch, the states of
            a learning-rate schedule and of generators.

    Raises:
        ModelError: if ``gm`` was not prepared.
        CheckpointError: if the disk refuses, or something in ``extra`` can not be written.

    >>> import tempfile
    >>> gm = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4", (torch.randn(3, 4),))
    >>> path = f"{tempfile.mkdtemp()}/state.safetensors"
    >>> save(gm, path, extra={"epoch": 3})
    >>> checkpoint_info(path).extra
    {'epoch': 3}
    """
    gm = graph_of(graph_inside(gm) if isinstance(gm, nn.Module) else gm, "prepared")
    plan = plan_of(gm)
    sites = fake_quants(gm)
    states = {"model": gm.state_dict(), "optimizer": None if optimizer is None else described(gm, optimizer)}
    tree = {
        "format": FORMAT,
        "versions": versions(),
        "graph": {"model": plan.model, "fingerprint": plan.fingerprint, "policy": plan.policy.to_dict()},
        "sites": {name: repr(site.site.spec) for name, site in sites.items()},
        "masks": {name: int(site.site_key) for name, site in sites.items()},
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": gathered(_random_state()),
        "extra": extra,
    }
    tree |= whole(states)  # on every rank, for sharded tensors are put together
    on_first_rank(lambda: tensor_tree.write(tree, path, KIND))


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    scheduler: PEGEScheduler | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **prepare_options: Any,
) -> GraphModule:
    """Read a checkpoint into a prepared model and return it; a float model is prepared first, under the stored policy.

    With a scheduler or an optimizer, a run goes on: they and the random number generators continue where they were. With
    ``torch.distributed``, every rank calls it. All is checked before anything is changed. No code in the file is executed.

    Args:
        path: of the checkpoint.
        model: a prepared one, which is changed in place; or a float one, which is left alone.
        scheduler: goes on where it was saved.
        optimizer: goes on where it was saved.
        prepare_options: for a float model: ``example_inputs``, ``batch_norm`` and so on, as they were given to ``prepare``.

    Raises:
        CheckpointError: if the file is missing, truncated, corrupt or foreign, or belongs to another model, policy,
            schedule or optimizer.

    >>> import tempfile
    >>> import pege_fx
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pege_fx.save(gm, f"{folder}/state.safetensors")
    ...     again = load(f"{folder}/state.safetensors", model, example_inputs=(torch.randn(2, 4),))
    >>> x = torch.randn(2, 4)
    >>> torch.equal(again.eval()(x), gm.eval()(x))
    True
    """
    tree = tensor_tree.read(path, KIND)
    info = _info(tree, path)
    try:
        model = unwrapped(model)
        is_prepared = check_stage(model, "float", "prepared") == "prepared"
        gm = graph_of(model, "prepared") if is_prepared else prepare(model, info.policy, **prepare_options)
    except PolicyError as error:
        raise CheckpointError(
            f"{path} is of another model ({info.model}): its policy does not fit this one.\n{error}"
        ) from error
    try:
        _take_over(path, tree, info, gm, scheduler, optimizer)
    except PegeError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not what save wrote: {type(error).__name__}: {error}") from error
    return gm


def _take_over(
    path: Any,
    tree: dict[str, Any],
    info: CheckpointInfo,
    gm: GraphModule,
    scheduler: PEGEScheduler | None,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    check_sites(path, info, gm)
    here = gm.state_dict()
    tree["model"] = {name: _as_held(value, here[name]) if name in here else value for name, value in tree["model"].items()}
    check_tensors(path, tree["model"], here)
    keys = {name: torch.tensor(operator.index(key), dtype=torch.int32) for name, key in tree["masks"].items()}
    tensors = {name: laid_out_as(value, here[name]) for name, value in tree["model"].items()}
    if optimizer is not None:
        check_optimizer(path, tree["optimizer"], described(gm, optimizer))
        check_entries(path, tree["optimizer"], optimizer)
        optimizer_state = _optimizer_state(tree["optimizer"], optimizer)
    if scheduler is not None or optimizer is not None:
        set_random_state = _random_state_to_set(path, tree["random"])
    if scheduler is not None:
        if info.scheduler is None:
            raise CheckpointError(f"{path} was saved without a scheduler: load it without, or give save the scheduler.")
        scheduler.load_state_dict(info.scheduler)  # the first to change something, and the last that may refuse
    gm.load_state_dict(tensors)
    for name, site in fake_quants(gm).items():
        site.site_key.copy_(keys[name])
    if optimizer is not None:
        optimizer.load_state_dict(optimizer_state)
    if scheduler is not None or optimizer is not None:
        set_random_state()


def checkpoint_info(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Return what a checkpoint says of itself.

    Args:
        path: of the checkpoint.

    Raises:
        CheckpointError: if it is missing, truncated, corrupt or foreign.

    >>> import tempfile
    >>> import pege_fx
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pege_fx.save(gm, f"{folder}/state.safetensors", extra={"epoch": 3})
    ...     checkpoint_info(f"{folder}/state.safetensors").extra
    {'epoch': 3}
    """
    return _info(tensor_tree.read(path, KIND), path)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    try:
        mine = metadata.version("pege_fx")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        mine = "unknown"
    return {"python": platform.python_version(), "torch": str(torch.__version__), "pege_fx": mine}


def _info(tree: Any, path: str | os.PathLike[str]) -> CheckpointInfo:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise CheckpointError(f"{path} has format {found!r}, this version reads {FORMAT}: upgrade pege_fx.")
    wrong = [name for name, kind in _PARTS.items() if name not in tree or not isinstance(tree[name], kind)]
    if wrong or tree["sites"].keys() != tree["masks"].keys():
        raise CheckpointError(f"{path} is not complete: {', '.join(wrong) or 'a mask'} missing, or of another kind.")
    try:
        model, fingerprint, policy = (tree["graph"][name] for name in ("model", "fingerprint", "policy"))
    except KeyError as error:
        raise CheckpointError(f"{path} is not complete: its graph has no {error}.") from error
    return CheckpointInfo(
        model,
        fingerprint,
        QuantPolicy.from_dict(policy),
        tree["sites"],
        tree["versions"],
        tree["scheduler"],
        tree["extra"],
    )


# --- does it belong here -----------------------------------------------------------------------------------------


# --- tensors of this run, on however many ranks --------------------------------------------------------------------


def _optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    laid_out = {
        index: {
            name: _beside(value, parameters[index]) if isinstance(value, Tensor) and name != "step" else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    groups = zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
    return {"state": laid_out, "param_groups": [{**mine, **other} for mine, other in groups]}  # another torch has more options


def _beside(value: Tensor, parameter: Tensor) -> Tensor:
    """What an optimizer holds for a parameter, laid out as that is if it has its shape."""
    value = _as_held(value, parameter)
    return laid_out_as(value, parameter) if value.shape == parameter.shape else value


def _as_held(value: Tensor, here: Tensor) -> Tensor:
    """A value per tensor in the shape that it has here: files of before 0.1.0 hold it 0-d."""
    return value.reshape(1) if value.ndim == 0 and here.shape == (1,) else value


# --- random numbers ------------------------------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    return state


def _random_state_to_set(path: Any, states: list[dict[str, Any]]) -> Callable[[], None]:
    """Return what sets the generators of this rank; each state was tried on a generator of its own before."""
    rank, _ = rank_and_size()
    if rank >= len(states):  # a run that goes on with more ranks than it had: the new ones keep their own
        return lambda: None
    state = states[rank]
    setters: list[Callable[[], object]] = []
    try:
        random.Random().setstate(state["python"])
        setters.append(lambda: random.setstate(state["python"]))
        torch.Generator().set_state(state["torch"])
        setters.append(lambda: torch.set_rng_state(state["torch"]))
        if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            for device, value in enumerate(state["cuda"]):
                torch.Generator(f"cuda:{device}").set_state(value)
            setters.append(lambda: torch.cuda.set_rng_state_all(state["cuda"]))
        if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
            name, keys, *rest = state["numpy"]
            whole_state = (name, keys.numpy().astype("uint32"), *rest)
            numpy.random.RandomState().set_state(whole_state)
            setters.append(lambda: numpy.random.set_state(whole_state))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has no state of random number generators that one can take: {error}.") from error

    def set_all() -> None:
        for setter in setters:
            setter()

    return set_all


def newest(path: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint that reads well: ``path``, or the one before it; None if there is neither.

    Args:
        path: as given to ``save``.

    Raises:
        CheckpointError: if ``path`` is none, or there are files, but none reads well.

    >>> print(newest("no such file"))
    None
    """
    found = [file for file in _generations(path_of(path, CheckpointError)) if os.path.exists(file)]
    first: CheckpointError | None = None
    for file in found:
        try:
            checkpoint_info(file)
        except CheckpointError as error:
            first = first or error
        else:
            return file
    if first is not None:
        raise first
    return None


def _generations(path: Path) -> Iterable[Path]:
    return path, tensor_tree.previous_of(path)
