"""Whether a checkpoint belongs to a model and an optimizer: all is compared before anything is changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pege_fx.errors import CheckpointError, closest
from pege_fx.modules.fake_quant import fake_quants
from pege_fx.policy.rules import QuantPolicy
from pege_fx.training.scheduler import plan_of


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


def check_sites(path: Any, info: CheckpointInfo, gm: GraphModule) -> None:
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


def check_tensors(path: Any, there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
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


def described(gm: GraphModule, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state, with the optimizer's class and the parameters of each group by name; those of something else have none."""
    known = {id(parameter): name for name, parameter in gm.named_parameters()}
    names = [[known.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "names": names} | optimizer.state_dict()


def check_optimizer(path: Any, there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
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


def check_entries(path: Any, there: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
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
