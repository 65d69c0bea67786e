"""The stage a model has reached (float, prepared, converted, engine), and errors that name the missing call.

    float --prepare--> prepared --convert--> converted --integer_engine--> engine

Every public function asks here for the stage that it works on, so that the same mistake has the same message everywhere.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import nn
from torch.fx import GraphModule

from pege_fx._utils.collectives import is_sharded
from pege_fx.errors import ModelError, PegeError
from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.numerics.functional import dequantize, quantize
from pege_fx.policy.plan import Plan

Stage: TypeAlias = Literal["float", "prepared", "converted", "engine"]

M = TypeVar("M", bound=nn.Module)
STAGES: tuple[Stage, ...] = get_args(Stage)
_CALLS = ("pege_fx.prepare(model, policy)", "pege_fx.convert(gm)", "pege_fx.integer_engine(deployed)")
_MADE_BY = ("", *_CALLS)
_WORDS: dict[Stage, str] = {"float": "a float model", "prepared": "prepared", "converted": "converted", "engine": "an engine"}
_COMPILED = "_orig_mod"  # the child of what torch.compile(module) returns: its class is not public


def stage_of(model: nn.Module) -> Stage:
    """Return the stage of a model, from what its graphs hold; ``meta`` answers for policies that leave all in float.

    Args:
        model: a graph, or a module that holds graphs.
    """
    modules = list(model.modules())
    if any(isinstance(module, FakeQuant) for module in modules):
        return "prepared"
    metas = [module.meta for module in modules if isinstance(module, GraphModule)]
    if any("engine" in meta for meta in metas) or any(getattr(module, "of_an_engine", False) for module in modules):
        return "engine"
    if any("replacement" in meta for meta in metas) or any(map(_has_codes, modules)):
        return "converted"
    return "prepared" if any(isinstance(meta.get("plan"), Plan) for meta in metas) else "float"


def _has_codes(module: nn.Module) -> bool:
    """Whether a graph quantizes: pickling keeps its nodes and loses its ``meta``."""
    return isinstance(module, GraphModule) and any(
        module.graph.find_nodes(op="call_function", target=function, sort=False) for function in (quantize, dequantize)
    )


def check_stage(model: Any, *allowed: Stage, error: type[PegeError] = ModelError) -> Stage:
    """Return the stage of a model, or of the graphs that it holds; raise if it is none of ``allowed``.

    The message names the calls that are missing, or the result that should have been given instead.

    Args:
        model: whatever a user gave.
        allowed: the stages that will do.
        error: class of the error.
    """
    name = type(model).__name__
    stage: Stage = stage_of(model) if isinstance(model, nn.Module) else "float"
    if stage in allowed:
        return stage
    here, wanted = STAGES.index(stage), STAGES.index(allowed[0])
    state = "" if stage == "float" else f", it is {_WORDS[stage]}"
    raise error(f"{name} {'is not' if wanted == 0 else 'was not'} {_WORDS[allowed[0]]}{state}: {_fix(here, wanted)}.")


def _fix(here: int, wanted: int) -> str:
    if here < wanted:
        *before, last = _CALLS[here:wanted]
        if wanted == 1:
            return f"call {last} first"
        return f"{''.join(f'call {call}, then ' for call in before)}give the result of {last}"
    if wanted == 0:
        return "give the model as it was before pege_fx.prepare"
    return f"give what {_MADE_BY[wanted]} returned, before {_MADE_BY[wanted + 1]}"


def graph_of(model: Any, *allowed: Stage, error: type[PegeError] = ModelError) -> GraphModule:
    """Return the graph that was given, without what is wrapped around it for training (DDP, an average, a compiler).

    Args:
        model: whatever a user gave.
        allowed: the stages that will do.
        error: class of the error.

    Raises:
        error: for a model of another stage, one that only holds such a graph, and one that FSDP has flattened.
    """
    model = unwrapped(model)
    check_stage(model, *allowed, error=error)
    if isinstance(model, GraphModule):
        return model
    name = type(model).__name__
    if isinstance(model, _flattening()):
        raise error(
            f"{name} has flattened the graph's parameters: inside FSDP.summon_full_params(model), give the graph itself."
        )
    inside = next(path for path, module in model.named_modules() if isinstance(module, GraphModule))
    raise error(f"{name} is no graph itself, it holds one: give model.{inside}.")


def graph_inside(model: nn.Module) -> nn.Module:
    """Return the one graph that a module without parameters of its own holds (an ``nn.Sequential`` of it), or the module.

    Enough for what is saved: nothing of the module is lost with it. What runs needs the graph itself, see ``graph_of``.
    """
    model = unwrapped(model)
    children = list(model.children())
    while not isinstance(model, GraphModule) and len(children) == 1 and not any(model.parameters(recurse=False)):
        (model,) = children
        children = list(model.children())
    return model


def unwrapped(model: Any) -> Any:
    """Return the model inside wrappers that call it and nothing more: DDP, DataParallel, AveragedModel, torch.compile."""
    while isinstance(model, nn.Module) and (inner := next(_wrapped(model), None)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> Iterator[nn.Module]:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    name = "module" if isinstance(model, wrappers) else _COMPILED
    return (child for found, child in model.named_children() if found == name)


def _flattening() -> tuple[type[nn.Module], ...]:
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.fsdp import FullyShardedDataParallel  # a second to import, and few need it

    return (FullyShardedDataParallel,)


def refuse_sharded_grids(sites: Iterable[FakeQuant], *, calibrated: bool = False) -> None:
    """Raise ``ModelError`` if a grid that data would set is sharded: what a forward writes into it is gone after it.

    Args:
        sites: of a prepared model.
        calibrated: grids that were set before will be set again.
    """
    for site in sites:
        if (calibrated or not site.is_calibrated) and any(map(is_sharded, site.method.parameters())):
            raise ModelError(
                f"{site.site.name} would be set from data, and its values are sharded among processes.\n"
                "  calibrate before the model is sharded, give prepare example_inputs, or shard it by pege_fx.shard(gm)."
            )


def refuse_shards(gm: GraphModule, fix: str) -> None:
    """Raise ``ModelError`` if a parameter lies in parts on several processes.

    Args:
        gm: a graph.
        fix: what to do instead.
    """
    names: Sequence[str] = [name for name, parameter in gm.named_parameters() if is_sharded(parameter)]
    if names:
        raise ModelError(f"{names[0]} and {len(names) - 1} more parameters are sharded among processes: {fix}.")


def copied(model: M) -> M:
    """Return a deep copy; of compressed sparse tensors too, which torch's own ``deepcopy`` can not copy (2.14)."""
    memo: dict[int, Any] = {}
    for value in (*model.parameters(), *model.buffers()):
        if value.layout is not torch.strided:
            made = value.detach().clone()
            memo[id(value)] = nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made
    return copy.deepcopy(model, memo)


def refuse_sparse(model: nn.Module, error: type[PegeError], *, made_dense: bool = False) -> None:
    """Raise if a graph reads a sparse tensor, and name it: files hold dense ones.

    Args:
        model: a converted one.
        error: class of the error.
        made_dense: let those pass of which the graph reads ``to_dense()`` alone; it can be computed before a file is written.
    """
    for gm in (module for module in model.modules() if isinstance(module, GraphModule)):
        tensors = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
        for node in gm.graph.find_nodes(op="get_attr"):
            value = tensors.get(str(node.target))
            if value is None or value.layout is torch.strided:
                continue
            if made_dense and all(user.target == "to_dense" for user in node.users):
                continue
            raise error(
                f"{node.target} is sparse ({value.layout}), and a file holds dense tensors.\n"
                "  hold it dense, or its indices and values as buffers of their own."
            )
