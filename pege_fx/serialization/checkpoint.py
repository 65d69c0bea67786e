"""Checkpoints: everything that a run needs to go on as if nothing had happened, in one safe and self-describing file."""

import operator
import os
import platform
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
from pege_fx.errors import CheckpointError, PegeError, PolicyError, closest
from pege_fx.modules.fake_quant import fake_quants
from pege_fx.modules.stages import check_stage, graph_inside, graph_of, unwrapped
from pege_fx.policy.rules import QuantPolicy
from pege_fx.serialization import tensor_tree
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


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        model: class of the float model.
        fingerprint: of the prepared graph, see ``Plan.fingerprint``.
        policy: under which it was prepared.
        sites: number format of every fake-quant, by path.
        versions: of Python, torch and pege_fx.
        scheduler: state of the scheduler, with position and refresh count; None if there was none.
        extra: what the user gave.
    """

    model: str
    fingerprint: str
    policy: QuantPolicy
    sites: Mapping[str, str]
    versions: Mapping[str, str]
    scheduler: Mapping[str, Any] | None
    extra: Any


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
    states = {"model": gm.state_dict(), "optimizer": None if optimizer is None else _described(gm, optimizer)}
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
    _check_sites(path, info, gm)
    here = gm.state_dict()
    tree["model"] = {name: _as_held(value, here[name]) if name in here else value for name, value in tree["model"].items()}
    _check_tensors(path, tree["model"], here)
    keys = {name: torch.tensor(operator.index(key), dtype=torch.int32) for name, key in tree["masks"].items()}
    tensors = {name: laid_out_as(value, here[name]) for name, value in tree["model"].items()}
    if optimizer is not None:
        _check_optimizer(path, tree["optimizer"], _described(gm, optimizer))
        _check_entries(path, tree["optimizer"], optimizer)
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


def _check_sites(path: Any, info: CheckpointInfo, gm: GraphModule) -> None:
    plan = plan_of(gm)
    here = {name: repr(site.site.spec) for name, site in fake_quants(gm).items()}
    if here == info.sites and plan.fingerprint == info.fingerprint:
        return
    lines = [f"{path} belongs to another graph or policy: {info.model}, not this {plan.model}."]
    for name in [*info.sites, *here]:
        there, now = info.sites.get(name, "not there"), here.get(name, "not there")
        if there != now:
            lines.append(f"  {name}: {there} in the file, {now} here.")
            break
    fix = "prepare the same model under checkpoint_info(path).policy, with the same example inputs and batch_norm."
    raise CheckpointError("\n".join([*lines, f"  {fix}"]))


def _check_tensors(path: Any, there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    if odd := sorted(set(there) ^ set(here)):
        where = "the file" if odd[0] in there else "this model"
        raise CheckpointError(
            f"{path} holds other tensors than this model: {odd[0]} is in {where} only; closest: "
            f"{closest(odd[0], here if odd[0] in there else there, 1)}.\n  prepare with the same batch_norm mode."
        )
    for name, value in here.items():
        if value.shape != there[name].shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(there[name].shape)} there and {tuple(value.shape)} here.")
        kinds = there[name].dtype, value.dtype
        was_bool = kinds[0] is torch.bool and name.rpartition(".")[2] == "calibrated"  # before averages could take it
        if kinds[0] != kinds[1] and not (kinds[1].is_floating_point and (kinds[0].is_floating_point or was_bool)):
            raise CheckpointError(f"{path}: {name} is {kinds[0]} there and {kinds[1]} here.")


def _described(gm: GraphModule, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state, with the optimizer's class and the parameters of each group by name; those of something else have none."""
    known = {id(parameter): name for name, parameter in gm.named_parameters()}
    names = [[known.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "names": names} | optimizer.state_dict()


def _check_optimizer(path: Any, there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
    if there is None:
        raise CheckpointError(f"{path} was saved without an optimizer: load it without, or give save the optimizer.")
    if there.get("class") != here["class"]:
        raise CheckpointError(
            f"{path} holds the state of {there.get('class')}, not of {here['class']}: make the same optimizer."
        )
    if there.get("names") != here["names"]:
        sizes, mine = ([len(group) for group in state.get("names", ())] for state in (there, here))
        raise CheckpointError(
            f"{path} holds an optimizer of other parameters: groups of {sizes} there, of {mine} here.\n"
            "  make the optimizer with the same groups, in the same order."
        )


def _check_entries(path: Any, there: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """What the optimizer itself finds out when it steps: the options of its groups, and what it keeps for a parameter."""
    mine = optimizer.state_dict()
    for number, (group, other) in enumerate(zip(mine["param_groups"], there["param_groups"], strict=True)):
        for name in group.keys() & other.keys():
            if not (_is_like(other[name], group[name]) and (name != "params" or other[name] == group[name])):
                raise CheckpointError(
                    f"{path}: {name} of the optimizer's group {number} is {other[name]!r} there and {group[name]!r} here."
                )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in there["state"].items():
        if index not in range(len(parameters)) or not isinstance(entries, Mapping):
            raise CheckpointError(f"{path}: the optimizer's state {index!r} belongs to none of {len(parameters)} parameters.")
        known, shape = mine["state"].get(index, {}), parameters[index].shape
        if known and known.keys() != entries.keys():
            raise CheckpointError(f"{path}: the optimizer keeps {[*entries]} for parameter {index}, here {[*known]}.")
        for name, value in entries.items():
            shapes = [known[name].shape] if isinstance(known.get(name), Tensor) else _shapes_kept(optimizer, shape)
            shapes += [torch.Size()] if shape == (1,) else []  # in files of before 0.1.0, see _as_held
            if shapes and isinstance(value, Tensor) and value.shape not in shapes:
                raise CheckpointError(f"{path}: {name} of the optimizer has shape {tuple(value.shape)}, not {tuple(shape)}.")


def _is_like(value: Any, here: Any) -> bool:
    """Whether an option of an optimizer is of the kind of the one that it has; a number may be a tensor of one."""
    kinds = (bool, str, NoneType, list, tuple, (int, float, Tensor))
    return any(isinstance(value, kind) and isinstance(here, kind) for kind in kinds) or None in (value, here)


def _shapes_kept(optimizer: torch.optim.Optimizer, shape: torch.Size) -> list[torch.Size]:
    """What torch's optimizers keep for a parameter: numbers, and tensors of its shape. Of others nothing is known."""
    plain = type(optimizer).__module__.startswith("torch.optim.") and type(optimizer).__name__ not in ("Adafactor", "LBFGS")
    return [torch.Size(), torch.Size((1,)), shape] if plain else []


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
