"""Number of dimensions of a node's value: from example inputs, or from what the operation itself demands."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from pege_fx.errors import InputError, OtherCallError
from pege_fx.modules.fake_quant import version_of
from pege_fx.modules.mode import PYTHON_FORWARD, evaluating, trial
from pege_fx.passes.capture.examples import fresh
from pege_fx.passes.graph import call_of, first_argument, join, owner, plain, rank_of, traits_of


class OtherGraphCallError(Exception):
    """A graph inside is called in another way than it was traced for: the message is its path."""


class _Recorder(Interpreter):
    """Runs the graph once and notes shape and dtype of every tensor, and what code outside of the graph writes to."""

    failed = False

    def run_node(self, n: Node) -> Any:
        assert isinstance(self.module, GraphModule)
        before = _versions(n, self.env) if traits_of(self.module, n).writes else None
        try:
            result = _note(n, super().run_node(n))
        except Exception as error:
            if not hasattr(error, "__notes__"):  # the innermost says where
                self.failed = True
                inner = str(n.target) if n.op == "call_module" and n.target != PYTHON_FORWARD else owner(n)
                error.add_note(f"in {join(self.module.meta.get('prefix', ''), inner) or 'the model itself'}")
            raise
        self._note_effects(n, before, result)
        return result

    def _note_effects(self, node: Node, before: dict[Node, list[int | None]] | None, result: Any) -> None:
        """Note to which inputs a node that may write did so, and in whose memory its result lies: in any of its calls."""
        if before is not None:
            now = _versions(node, self.env)
            changed = {source for source, versions in now.items() if versions != before[source] or None in versions}
            node.meta["writes"] = [*dict.fromkeys([*node.meta.get("writes", ()), *filter(changed.__contains__, now)])]
        if made := _memory(result):
            shares = [source for source in node.all_input_nodes if made & _memory(self.env[source])]
            if shares:
                node.meta["shares"] = [*dict.fromkeys([*node.meta.get("shares", ()), *shares])]

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return plain(super().fetch_args_kwargs_from_env(n))  # type: ignore[no-any-return]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the arguments of ``forward``."""
        assert isinstance(self.module, GraphModule)
        placeholders = self.module.graph.find_nodes(op="placeholder")
        bound = inspect.Signature(list(_parameters(placeholders))).bind(*args, **kwargs)
        bound.apply_defaults()
        return self.run(initial_env={n: _note(n, bound.arguments[str(n.target).lstrip("*")]) for n in placeholders})


def _parameters(placeholders: Iterable[Node]) -> Iterator[inspect.Parameter]:
    """What ``forward`` takes, which is not compiled yet."""
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for node in placeholders:
        name = str(node.target)
        default: Any = node.args[0] if node.args else inspect.Parameter.empty
        if name.startswith("**"):
            yield inspect.Parameter(name[2:], inspect.Parameter.VAR_KEYWORD)
        elif name.startswith("*"):
            yield inspect.Parameter(name[1:], inspect.Parameter.VAR_POSITIONAL)
            kind = inspect.Parameter.KEYWORD_ONLY
        else:
            yield inspect.Parameter(name, kind, default=default)


def _versions(node: Node, values: Mapping[Node, Any]) -> dict[Node, list[int | None]]:
    """How often autograd counted a write to the tensors that come into a node, by source; None where it does not count."""
    return {source: [version_of(tensor) for tensor in _tensors(values[source])] for source in node.all_input_nodes}


def _memory(value: Any) -> set[int]:
    """The addresses of the memory in which tensors lie; those that are sparse, or under vmap, have none to show."""
    found = set()
    for tensor in _tensors(value):
        with contextlib.suppress(RuntimeError):
            found.add(tensor.untyped_storage().data_ptr())
    return found - {0}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _note(node: Node, value: Any) -> Any:
    if isinstance(value, Tensor):
        node.meta["rank"], node.meta["shape"], node.meta["dtype"] = value.ndim, tuple(value.shape), value.dtype
    return value


def record_shapes(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], inner: Iterable[GraphModule] = ()) -> None:
    """Run the graph on example inputs (evaluation mode, no gradient) and note the shapes in ``meta``.

    ``inner`` are graphs that it calls, directly or through Python: theirs are noted at their last call.

    Raises:
        OtherGraphCallError: if one of them is called in another way than it was traced for, in evaluation or in training.
        InputError: if the model fails on these inputs.
    """
    recorders = {graph: _Recorder(graph) for graph in inner if graph is not gm}
    try:
        for graph, recorder in recorders.items():
            graph.__dict__["forward"] = recorder.call
        with trial(gm.modules()), evaluating(gm):
            if recorders or any(traits_of(gm, node).writes for node in gm.graph.nodes):
                _try_in_training(gm, *fresh((args, kwargs)), recorders)
            gm.eval()
            given, named = fresh((args, kwargs))
            _Recorder(gm).call(*given, **named)
    except OtherGraphCallError:
        raise
    except OtherCallError as error:
        raise OtherGraphCallError(error.__notes__[0].removeprefix("in ")) from error
    except Exception as error:
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in (*args, *kwargs.values())]
        where = getattr(error, "__notes__", ["before any of its modules ran"])[0]
        reason = str(error).split("\n\nWhile executing ")[0]
        raise InputError(
            f"the model fails on the example inputs {shapes}, {where}: {type(error).__name__}: {reason}"
        ) from error
    finally:
        for graph in recorders:
            graph.__dict__.pop("forward", None)


def _try_in_training(
    gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], recorders: Mapping[GraphModule, _Recorder]
) -> None:
    """Raise if training calls a graph inside in another way; other errors are for evaluation to find."""
    gm.train()
    with torch.random.fork_rng(devices=()):
        try:
            _Recorder(gm).call(*args, **kwargs)
        except OtherCallError:
            raise
        except (TypeError, AttributeError, LookupError) as error:  # None where evaluation gives a list, and the like
            if path := next((graph.meta["prefix"] for graph, recorder in recorders.items() if recorder.failed), ""):
                raise OtherGraphCallError(path) from error
        except Exception:
            return


def infer_ranks(gm: GraphModule) -> None:
    """Note the number of dimensions that an operation's own contract proves, where no example says it."""
    for node in gm.graph.nodes:
        if "rank" in node.meta:
            continue
        if (rank := _inferred(gm, node)) is not None:
            node.meta["rank"] = rank


def _inferred(gm: GraphModule, node: Node) -> int | None:
    traits = traits_of(gm, node)
    stated = traits.rank(call_of(gm, node)) if callable(traits.rank) else traits.rank
    return rank_of(first_argument(node)) if stated is None and traits.keeps_rank else stated
