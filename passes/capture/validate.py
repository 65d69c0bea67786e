"""Translation validation: whether what was captured computes what the model does, on one call, in both modes.

Outputs, gradients, buffers and what the call left in its arguments are compared bit for bit, since the same operations run.
What a decomposition rounds otherwise is held against what rounding does to the model itself.
"""

import copy
import functools
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from pege_fx._utils.comparison import UnorderedDraws, difference, largest, leaves, same, same_random_numbers, tensors
from pege_fx.decompositions.decompose import decompose_modules
from pege_fx.errors import OtherCallError, PegeWarning, VerifyError
from pege_fx.modules.mode import preserve_state
from pege_fx.passes.capture.examples import fresh
from pege_fx.passes.capture.first_difference import first_difference
from pege_fx.passes.capture.model_copy import copied

Call: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
Around: TypeAlias = AbstractContextManager[Any]
_BUFFER = "after the call, buffer "
_QUIET = threading.RLock()  # the warning filters are those of all threads: one at a time changes them and puts them back
_PERTURBATIONS = 3  # draws of the rounding


@dataclass
class _Run:
    """What a call left, by name, or the error that it ended in."""

    values: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


def validate(model: nn.Module, gm: GraphModule, graphs: Iterable[GraphModule], call: Call) -> None:
    """Run what was captured beside the model, in evaluation and in training, and compare all that a call leaves.

    A mode in which the model fails by itself is left out. Nothing of either changes.

    Args:
        model: as it was given; a copy of it runs, with its own parameters.
        gm: what was captured of it, not rewritten yet.
        graphs: the graphs inside, ``gm`` too.
        call: positional and keyword arguments.

    Raises:
        VerifyError: if they differ by more than rounding explains; names the first node that parts.
    """
    gm.recompile()
    # Processes that wait for each other in SyncBatchNorm would have to come to the same verdict at the same time.
    waits = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    with torch.inference_mode(mode=False), torch.enable_grad():  # in this order: the first says something of gradients too
        for training in (False,) if waits else (False, True):
            _Comparison(model, gm, list(graphs), call, training).check()


def fails_by_itself(model: nn.Module, gm: GraphModule, call: Call) -> bool:
    """Tell whether a model fails on a call in evaluation, so that it is no fault of ``gm``, its graph, that does."""
    with torch.inference_mode(mode=False), torch.no_grad():
        return _Comparison(model, gm, [], call, training=False)._of_model(decomposed=False).error is not None


def validate_conversion(gm: GraphModule, deployed: GraphModule, call: Call) -> None:
    """Run a deployable graph beside the prepared one in evaluation, and compare bit for bit all that a call leaves.

    Raises:
        VerifyError: if they differ; names the first node that parts. A prepared model that fails on the call, or does not
            repeat itself, says nothing.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        comparison = _Comparison(gm, deployed, [], call, training=False)
        expected = comparison.run(gm)
        parted = {} if expected.error is not None else _parted(expected, comparison.run(deployed), buffers=False)
        if parted and not _parted(expected, comparison.run(gm), buffers=False):
            name, how = next(iter(parted.items()))
            where = first_difference(copy.deepcopy(gm), deployed, [], comparison.run)
            raise VerifyError(
                f"what was converted is not what the prepared model computes in evaluation: {name} {how}.\n"
                f"  {where or 'all of its values are values of the prepared model'}.\n"
                "  please report it; check=False converts the model all the same."
            )


@dataclass
class _Comparison:
    """A model beside its graph in one mode."""

    model: nn.Module
    gm: GraphModule
    graphs: list[GraphModule]
    call: Call
    training: bool
    differentiable: bool = False  # the inputs need gradients
    backward: bool = False  # gradients are computed; else autograd's graph is compared, which says most of it

    def check(self) -> None:
        """Raise ``VerifyError`` if the two part."""
        for differentiable in (True, False) if self.training else (False,):
            self.differentiable, self.backward = differentiable, self.training
            expected = self._of_model()
            if expected.error is not None:
                continue  # a write to an input that needs a gradient, say
            found = self._of_graph()
            if isinstance(found.error, OtherCallError) and self.differentiable:
                continue  # it asks whether its input needs a gradient
            if _parted(expected, found):
                self.backward = True
                self._judge()
            if not self.training:
                self._check_decompositions(expected)
            return

    def _judge(self) -> None:
        """Raise unless rounding, the order of random draws or the model's own caprice explains that they parted."""
        for around in (nullcontext, UnorderedDraws):
            expected, found = self._of_model(around()), self._of_graph(around())
            if not (parted := _parted(expected, found)):
                return
            again = _parted(expected, self._of_model(around()))
            if any(name in again for name in parted):
                self._warn_of_caprice(next(iter(again)))
                return
            if found.error is None and not _parted(expected, found, self._rounding(expected, around)):
                return
        raise self._error(parted, self._where()) from found.error

    def _check_decompositions(self, written_out: _Run) -> None:
        """Hold what is written out, where anything is, against torch's own layers: without gradients, in evaluation."""
        if not self._has_decompositions:
            return
        with torch.no_grad():
            own = self._of_model(decomposed=False)
            written_out = _Run({name: value for name, value in written_out.values.items() if name in own.values})
            if own.error is not None or not _parted(own, written_out, self._smallest_rounding(own)):
                return
            if parted := _parted(own, written_out, self._rounding(own, decomposed=False)):
                raise self._error(parted, "torch's own layers, written out, give something else")

    @functools.cached_property
    def _has_decompositions(self) -> bool:
        reference = copied(self.model, share_parameters=True)
        classes = [type(module) for module in reference.modules()]
        decompose_modules(reference)
        return classes != [type(module) for module in reference.modules()]

    def _error(self, parted: Mapping[str, str], where: str) -> VerifyError:
        mode = "training" if self.training else "evaluation"
        name, how = next(iter(parted.items()))
        return VerifyError(
            f"what was captured of {type(self.model).__name__} is not what it computes, in {mode}: {name} {how}.\n"
            f"  {where}.\n"
            "  write that part in another way, or keep it out of forward; check=False prepares the model all the same."
        )

    def _where(self) -> str:
        where = first_difference(self._reference(), self.gm, self.graphs, self.run)
        return where or "all values of the graph are values of the model: it is the order, or what comes back, that differs"

    def _warn_of_caprice(self, name: str) -> None:
        warnings.warn(
            f"{type(self.model).__name__} does not repeat itself ({name} differs between two calls with the same random "
            "state): what was captured of it can not be checked.",
            PegeWarning,
            stacklevel=6,
        )

    def _reference(self, decomposed: bool = True) -> nn.Module:
        reference = copied(self.model, share_parameters=True, share_buffers=False)
        if decomposed:
            decompose_modules(reference)
        return reference

    def _of_model(self, around: Around | None = None, *, decomposed: bool = True, noise: torch.Generator | None = None) -> _Run:
        return self.run(self._reference(decomposed), around, noise)

    def _of_graph(self, around: Around | None = None) -> _Run:
        return self.run(self.gm, around)

    def run(self, module: nn.Module, around: Around | None = None, noise: torch.Generator | None = None) -> _Run:
        """Call a module; what it changes in itself is put back."""
        devices = {value.device for value in (*self.model.parameters(), *self.model.buffers())}
        with ExitStack() as stack:
            stack.enter_context(preserve_state(module.modules()))
            module.train(self.training)
            stack.enter_context(same_random_numbers(devices))
            stack.enter_context(_QUIET)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the model says it again to the user, and some things of our gradients alone
            stack.enter_context(around or nullcontext())
            try:
                (args, kwargs), inputs = _fresh(self.call, self.differentiable, noise)
                if noise is not None:
                    _perturb_results(module, noise)
                output = module(*args, **kwargs)
                values = dict(leaves("the output", output)) | dict(leaves("after the call, argument ", [*args, kwargs]))
                values.update(self._gradients(module, output, inputs))
            except Exception as error:
                return _Run(error=error)
            buffers = dict(module.named_buffers(remove_duplicate=False))
            for name, before in self.model.named_buffers(remove_duplicate=False):
                after = buffers.get(name)
                if after is None or after.shape == before.shape:  # of another size it is a cache, which a graph makes anew
                    values[f"{_BUFFER}{name}"] = None if after is None else after.detach().clone()
        return _Run({name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()})

    def _gradients(self, module: nn.Module, output: Any, inputs: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
        """The gradients of what a call returned, weighted at random, by the name of the parameter or the input."""
        if not torch.is_grad_enabled():
            return
        results = [(name, y) for name, y in tensors("the output", output) if y.is_floating_point() or y.is_complex()]
        yield from ((f"whether {name} needs a gradient", y.requires_grad) for name, y in results)
        results = [(name, y) for name, y in results if y.requires_grad and not y.is_meta]
        if not self.backward:
            yield "autograd's graph", _autograd_graph([y for _, y in results])
            return
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        named = dict(module.named_parameters(remove_duplicate=False))  # get_parameter does not know those of scripted modules
        wanted = {f"the gradient of {name}": named[name] for name in names} | inputs
        if not (results and wanted):
            return
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device) for _, y in results]
        found = torch.autograd.grad(
            [y for _, y in results], list(wanted.values()), weights, allow_unused=True, materialize_grads=True
        )
        yield from zip(wanted, found, strict=True)

    def _rounding(self, expected: _Run, around: type[Around] = nullcontext, *, decomposed: bool = True) -> dict[str, float]:
        """Return how far rounding may move each value: as far as it does where every module's result is off by one ulp.

        A decomposition differs by the rounding of its sums, which grows with the root of their number of terms.
        """
        spread: dict[str, float] = {}
        for seed in range(_PERTURBATIONS):
            moved = self._of_model(around(), decomposed=decomposed, noise=torch.Generator().manual_seed(seed))
            for name, x, y in _pairs(expected, moved):
                spread[name] = max(spread.get(name, 0.0), float(difference(x, y).max()) if x.numel() else 0.0)
        least = self._smallest_rounding(expected)
        return {name: bound + self._growth * spread.get(name, 0.0) for name, bound in least.items()}

    def _smallest_rounding(self, expected: _Run) -> dict[str, float]:
        """That of sums over as many terms as the model has, where nothing enlarges it on its way."""
        return {name: self._growth * torch.finfo(x.dtype).eps * largest(x) for name, x, _ in _pairs(expected, expected)}

    @functools.cached_property
    def _growth(self) -> float:
        weights = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        return math.sqrt(max((w.numel() // max(w.shape[0], 1) for w in weights), default=1) * max(len(weights), 1))


def _autograd_graph(results: list[Tensor]) -> list[Any]:
    """Return autograd's graph behind some tensors in an order that depends on it alone: operations, edges, leaves' shapes."""
    numbers: dict[Any, int] = {}
    found: list[Any] = []
    waiting: list[Any] = [y.grad_fn or y for y in results]
    while waiting:
        node = waiting.pop()
        if node in numbers:
            found.append(numbers[node])
            continue
        numbers[node] = len(numbers)
        leaf = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if leaf is not None:
            found.append(tuple(leaf.shape))
            continue
        found.append(node.name())
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found


def _pairs(expected: _Run, found: _Run) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The floating-point tensors that both have, in one shape."""
    for name, x in expected.values.items():
        y = found.values.get(name)
        if isinstance(y, Tensor) and _are_comparable(x, y) and (x.is_floating_point() or x.is_complex()):
            yield name, x, y


def _are_comparable(x: Any, y: Any) -> bool:
    """Tell whether two values are dense tensors of one form, the elements of which can be subtracted."""
    return isinstance(x, Tensor) and isinstance(y, Tensor) and _form(x) == _form(y) and x.layout is torch.strided


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.layout, x.device


def _parted(expected: _Run, found: _Run, allowed: Mapping[str, float] | None = None, *, buffers: bool = True) -> dict[str, str]:
    """Say what differs, and by how much, by name."""
    if found.error is not None:
        return {"a call": f"raises {type(found.error).__name__}: {found.error}"}
    caches = {name for name in found.values if name.startswith(_BUFFER) and name not in expected.values}
    names = [*expected.values, *(name for name in found.values if name not in expected.values and name not in caches)]
    missing = object()
    parted: dict[str, str] = {}
    for name in names if buffers else (name for name in names if not name.startswith(_BUFFER)):
        x, y = expected.values.get(name, missing), found.values.get(name, missing)
        if x is missing or y is missing:
            parted[name] = "is missing" if y is missing else "is there, and not in the model"
        elif not same(x, y) and not _is_within(x, y, (allowed or {}).get(name, 0.0)):
            parted[name] = _how(x, y)
    return parted


def _is_within(x: Any, y: Any, bound: float) -> bool:
    return bound > 0 and _are_comparable(x, y) and bool((difference(x, y) <= bound).all())


def _how(x: Any, y: Any) -> str:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return f"is {_shown(y)} instead of {_shown(x)}"
    if _form(x) != _form(y):
        return f"is {_described(y)} instead of {_described(x)}"
    if not (x.is_floating_point() or x.is_complex()):
        return f"differs in {int((x != y).sum())} of {x.numel()} elements"
    return f"differs by {float(difference(x, y).max()):.3g} (largest value {largest(x):.3g})"


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {_described(value)}"
    return repr(value) if isinstance(value, (bool, int, float, complex, str, type(None))) else f"a {type(value).__name__}"


def _fresh(call: Call, differentiable: bool, noise: torch.Generator | None) -> tuple[Call, dict[str, Tensor]]:
    """Return copies of the arguments, which the call may fill, and those of them that need a gradient, by name."""
    memo: dict[int, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def prepared(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
            return value
        if id(value) not in memo:
            leaf = memo[id(value)] = value.detach() if noise is None else value.detach() * (1 + _signs(value, noise))
            if differentiable or value.requires_grad:
                inputs[f"the gradient of input {len(memo) - 1}"] = leaf.requires_grad_()
                memo[id(value)] = leaf.clone()  # no leaf, so that the model may write to it
        return memo[id(value)]

    args, kwargs = call
    copies: Call = tree_map(prepared, fresh((tuple(args), dict(kwargs))))
    return copies, inputs


def _signs(x: Tensor, noise: torch.Generator) -> Tensor:
    """Plus or minus one unit in the last place, relative."""
    signs = torch.randint(2, x.shape, generator=noise).to(x.device) * 2 - 1
    return signs * torch.finfo(x.dtype).eps


def _perturb_results(module: nn.Module, noise: torch.Generator) -> None:
    """Let every result of a module without children be off by one unit in the last place."""

    def perturb(_: nn.Module, args: Any, result: Any) -> Any:
        return tree_map(lambda y: y * (1 + _signs(y, noise)) if isinstance(y, Tensor) and y.is_floating_point() else y, result)

    for child in module.modules():
        if not list(child.children()):
            child.register_forward_hook(perturb)
