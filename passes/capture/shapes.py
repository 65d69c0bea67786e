"""Shapes, types and writes of every node, from a run on the example inputs."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from pege_fx.errors import InputError, OtherCallError
from pege_fx.modules.mode import PYTHON_FORWARD, evaluating, preserve_state
from pege_fx.modules.schedule_state import version_of
from pege_fx.passes.capture.examples import fresh
from pege_fx.passes.graph import join, owner, plain, traits_of


@dataclass
class _Failure:
    """An error of a run, the path of the innermost module that it comes from, and the path of that module's graph."""

    error: Exception | None = None
    path: str = ""
    graph: str = ""


class _Recorder(Interpreter):
    """Runs the graph once and notes shape and dtype of every tensor, and what code outside of the graph writes to."""

    def __init__(self, gm: GraphModule, failure: _Failure) -> None:
        super().__init__(gm)
        self.failure = failure

    def run_node(self, n: Node) -> Any:
        assert isinstance(self.module, GraphModule)
        before = _versions(n, self.env) if traits_of(self.module, n).writes else None
        try:
            result = _note(n, super().run_node(n))
        except Exception as error:
            if self.failure.error is not error:  # the innermost says where; a model may have caught others
                graph = self.module.meta.get("prefix", "")
                inner = str(n.target) if n.op == "call_module" and n.target != PYTHON_FORWARD else owner(n)
                self.failure.error, self.failure.path, self.failure.graph = error, join(graph, inner), graph
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
        node.meta |= {"rank": value.ndim, "shape": tuple(value.shape), "dtype": value.dtype, "layout": value.layout}
    return value


def record_shapes(
    gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], inner: Iterable[GraphModule] = ()
) -> str | None:
    """Run the graph on example inputs (evaluation mode, no gradient) and note the shapes in ``meta``.

    Args:
        gm: the whole model.
        args: positional arguments of ``forward``.
        kwargs: keyword arguments of ``forward``.
        inner: graphs that it calls, directly or through Python: theirs are noted at their last call.

    Returns:
        The path of a graph that is called in another way than it was traced for, in evaluation or in training: that module
        has to stay Python; "" is the whole model, which writes to what it asks. None if there is none.

    Raises:
        InputError: if the model fails on these inputs.
    """
    failure = _Failure()
    recorders = {graph: _Recorder(graph, failure) for graph in inner if graph is not gm}
    try:
        for graph, recorder in recorders.items():
            graph.__dict__["forward"] = recorder.call
        with preserve_state(gm.modules()), evaluating(gm):
            may_differ = recorders or any(traits_of(gm, node).writes for node in gm.graph.nodes)
            if may_differ and (path := _called_otherwise_in_training(gm, *fresh((args, kwargs)), failure)) is not None:
                return path
            gm.eval()
            given, named = fresh((args, kwargs))
            _Recorder(gm, failure).call(*given, **named)
    except OtherCallError:
        return failure.graph
    except Exception as error:
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in (*args, *kwargs.values())]
        is_inside = failure.error is error
        where = f"in {failure.path or 'the model itself'}" if is_inside else "before any of its modules ran"
        reason = str(error).split("\n\nWhile executing ")[0]
        raise InputError(
            f"the model fails on the example inputs {shapes}, {where}: {type(error).__name__}: {reason}"
        ) from error
    finally:
        for graph in recorders:
            graph.__dict__.pop("forward", None)
    return None


def _called_otherwise_in_training(
    gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], failure: _Failure
) -> str | None:
    """Return the path of a graph inside that training calls in another way; other errors are for evaluation to find."""
    gm.train()
    with torch.random.fork_rng(devices=()):
        try:
            _Recorder(gm, failure).call(*args, **kwargs)
        except OtherCallError:
            return failure.graph
        except (TypeError, AttributeError, LookupError):  # None where evaluation gives a list, and the like
            return failure.graph or None
        except Exception:
            return None
    return None
