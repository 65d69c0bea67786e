"""Where a graph parts from the model that it was captured of: the first node whose value the model never has."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.overrides import TorchFunctionMode

from pege_fx._utils.comparison import tensors
from pege_fx.modules.calls import takes_hooks
from pege_fx.modules.mode import TRAINING_MODE
from pege_fx.passes.graph import join, owner, plain

_CLOSE = 1e-4  # of the norm: no question of bits, but which of the model's values it is


class _Fingerprint(NamedTuple):
    """What is kept of a tensor, of which a model has too many: its form, its norm and its projection on a fixed direction."""

    form: tuple[Any, ...]
    norm: float
    projection: float

    @classmethod
    def of(cls, x: Tensor) -> "_Fingerprint":
        form = (tuple(x.shape), x.dtype, x.requires_grad)
        if x.is_meta or x.layout is not torch.strided or x.is_quantized or x.is_nested:
            return cls(form, 0.0, 0.0)
        flat = x.detach().flatten().to(torch.complex128 if x.is_complex() else torch.float64).abs().nan_to_num(0.0, 1.0, -1.0)
        signed = flat if x.is_complex() or not x.is_signed() else x.detach().flatten().double().nan_to_num(0.0, 1.0, -1.0)
        direction = torch.cos(torch.arange(flat.numel(), dtype=torch.float64, device=x.device))
        return cls(form, float(flat.norm()), float(signed @ direction))

    def is_close(self, other: "_Fingerprint") -> bool:
        allowed = _CLOSE * max(self.norm, other.norm)
        return abs(self.norm - other.norm) <= allowed and abs(self.projection - other.projection) <= allowed


class _Values(TorchFunctionMode):
    """Every tensor that a function of torch returns while the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[tuple[Any, ...], list[_Fingerprint]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, value: Any) -> None:
        """Note the tensors of a result."""
        for _, x in tensors("", value):
            fingerprint = _Fingerprint.of(x)
            self.known.setdefault(fingerprint.form, []).append(fingerprint)

    def has(self, value: Any) -> bool:
        """Tell whether every tensor of a value is one that was noted."""
        found = [_Fingerprint.of(x) for _, x in tensors("", value)]
        return all(any(one.is_close(other) for other in self.known.get(one.form, ())) for one in found)


class _Watch(Interpreter):
    """Runs a graph, and tells which nodes have a value that the model never has though their inputs are the model's."""

    def __init__(self, gm: GraphModule, values: _Values, parted: list[tuple[GraphModule, Node]]) -> None:
        super().__init__(gm)
        self.signature, self.values, self.parted = inspect.signature(gm.forward), values, parted
        self._unknown: set[Node] = set()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the arguments of ``forward``."""
        assert isinstance(self.module, GraphModule)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = bound.arguments
        placeholders = self.module.graph.find_nodes(op="placeholder")
        self._unknown.clear()
        return self.run(initial_env={node: named[str(node.target).lstrip("*")] for node in placeholders})

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return plain(super().fetch_args_kwargs_from_env(n))  # type: ignore[no-any-return]

    def run_node(self, n: Node) -> Any:
        assert isinstance(self.module, GraphModule)
        follows = any(source in self._unknown for source in n.all_input_nodes)
        try:
            result = super().run_node(n)
        except Exception:
            self.parted.append((self.module, n))
            raise
        if n.op not in ("get_attr", "placeholder", "output") and n.target != TRAINING_MODE and not self.values.has(result):
            self._unknown.add(n)
            if not follows:
                self.parted.append((self.module, n))
        return result


Runner = Callable[[nn.Module, Any], Any]


def first_difference(model: nn.Module, gm: GraphModule, graphs: Iterable[GraphModule], run: Runner) -> str:
    """Return where a graph parts from its model: node, line and module; "" if all of its values are the model's.

    Args:
        model: a copy, which may be changed.
        gm: the graph.
        graphs: those inside it.
        run: calls a module within a context.
    """
    values = _Values()
    parted: list[tuple[GraphModule, Node]] = []
    for module in filter(takes_hooks, model.modules()):
        module.register_forward_hook(lambda _, args, result: values.add((args, result)))
    run(model, values)
    watches = {graph: _Watch(graph, values, parted) for graph in {gm, *graphs}}
    try:
        for graph, watch in watches.items():
            graph.__dict__["forward"] = watch.call
        run(gm, None)
    finally:
        for graph in watches:
            graph.__dict__.pop("forward", None)
    return _described(*parted[0]) if parted else ""


def _described(gm: GraphModule, node: Node) -> str:
    meta: Mapping[str, Any] = node.meta
    line = str(meta.get("stack_trace", "")).strip().splitlines()
    where = f", {line[-1].strip()}" if line else ""
    path = join(gm.meta.get("prefix", ""), owner(node)) or "the model's own forward"
    return f"the first node that parts: {node.name}{where}, in {path}"
