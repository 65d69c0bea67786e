"""Which sizes of a program stay free: the first of every input, and those that are asked for by ``dynamic_shapes``.

A model may choose by a size (``if x.shape[0] > 3`` in code that stays Python, or inside a function of torch). A program holds
one choice, so a size is free only if torch proves that nothing was decided by it, or if the program gives what the model gives
on the sizes where something could have been.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pege_fx.errors import ExportError
from pege_fx.export.calls import TOKEN_TYPES, copied
from pege_fx.modules.mode import preserve_state
from pege_fx.training.batches import Call

Sizes = dict[int, Any]  # by dimension: a Dim, a hint of torch's (Dim.AUTO), or None where it is fixed
_TRIED = 64  # sizes up to here, and up to four times the example's, are tried


class SizeChoiceError(Exception):
    """A size that was to be free decides what the model computes."""


def sizes_of(value: Tensor) -> tuple[Any, ...]:
    """Return a traced tensor's shape: an int for every size that is fixed, also where torch.export found that out late."""
    return tuple(int(size) if str(size).isdigit() else size for size in value.shape)


def asked_sizes(arguments: Mapping[str, Any], leaves: list[Any], dynamic_shapes: Any) -> list[Sizes]:
    """Return what ``dynamic_shapes`` says of every leaf of the arguments.

    Args:
        arguments: by parameter, with the number of its leaf for every tensor, and -1 for what is none.
        leaves: of all arguments.
        dynamic_shapes: as ``torch.export`` takes it, with names in place of a ``Dim`` too; parameters may be left out.

    Raises:
        ExportError: for what does not fit the arguments.
    """
    found: list[Sizes] = [{} for _ in leaves]
    dims: dict[str, Any] = {}

    def enter(place: Any, asked: Any, path: str) -> None:
        if asked is None:
            return
        if isinstance(place, int):
            if place < 0:
                raise ExportError(f"dynamic_shapes: {path} is no tensor, and has no sizes: give None.")
            found[place] = {dim: _dim(size, dims, path) for dim, size in _by_dimension(asked, leaves[place], path)}
        elif isinstance(place, Mapping) and isinstance(asked, Mapping) and set(asked) <= set(place):
            for key, part in asked.items():
                enter(place[key], part, f"{path}[{key!r}]")
        elif isinstance(place, Sequence) and isinstance(asked, Sequence) and len(place) == len(asked):
            for i, part in enumerate(asked):
                enter(place[i], part, f"{path}[{i}]")
        else:
            raise ExportError(f"dynamic_shapes: {path} is {asked!r}, which has not the form of that argument.")

    if isinstance(dynamic_shapes, Sequence) and not isinstance(dynamic_shapes, str) and len(dynamic_shapes) <= len(arguments):
        dynamic_shapes = dict(zip(arguments, dynamic_shapes, strict=False))
    if not isinstance(dynamic_shapes, Mapping) or not set(dynamic_shapes) <= set(arguments):
        raise ExportError(
            f"dynamic_shapes={dynamic_shapes!r}: give a dict by parameter ({', '.join(arguments)}), or a tuple in that order."
        )
    for name, asked in dynamic_shapes.items():
        enter(arguments[name], asked, name)
    return found


def _by_dimension(asked: Any, leaf: Tensor, path: str) -> list[tuple[int, Any]]:
    if not isinstance(asked, (Mapping, list, tuple)):
        raise ExportError(f"dynamic_shapes: {path} is {asked!r}: give its free sizes by dimension, as {{1: 'length'}}.")
    pairs = list(asked.items()) if isinstance(asked, Mapping) else list(enumerate(asked))
    for dim, _ in pairs:
        if not isinstance(dim, int) or not -leaf.ndim <= dim < leaf.ndim:
            raise ExportError(f"dynamic_shapes: {path} has {leaf.ndim} dimensions, and no dimension {dim!r}.")
        if dim % leaf.ndim and leaf.shape[dim] == 1:
            raise ExportError(
                f"dynamic_shapes: {path} has one in dimension {dim}, which torch.export fixes: give an example with more."
            )
    return [(dim % leaf.ndim, size) for dim, size in pairs if size is not None]


def _dim(size: Any, known: dict[str, Any], path: str) -> Any:
    if isinstance(size, str):
        if not size.isidentifier():
            raise ExportError(f"dynamic_shapes: {path} has a size named {size!r}: give a name as Python has them.")
        return known.setdefault(size, Dim(size))
    if size == Dim.STATIC or isinstance(size, int):
        return None
    if not isinstance(size, (Dim, type(Dim.AUTO))):
        raise ExportError(f"dynamic_shapes: {path} has a size {size!r}: give a torch.export.Dim, a name or None.")
    return size


def _is_hint(size: Any) -> bool:
    return isinstance(size, type(Dim.AUTO))


def _is_plain(size: Any) -> bool:
    """Whether a size is what torch likes, or a Dim that is computed from no other."""
    return _is_hint(size) or type(size) is Dim


def _hinted(free: list[Sizes]) -> list[tuple[int, int]]:
    return [(i, dim) for i, sizes in enumerate(free) for dim, size in sizes.items() if _is_hint(size)]


class Exporter:
    """Exports a module on one call, with sizes that stay free.

    Args:
        module: whose every node is a step.
        call: example arguments.
        arguments: the same by parameter.
        dynamic_shapes: see ``asked_sizes``.
    """

    def __init__(self, module: nn.Module, call: Call, arguments: Mapping[str, Any], dynamic_shapes: Any) -> None:
        self.module = module
        self.leaves, self.tree = tree_flatten(call)
        places = {id(leaf): i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)}
        self.arguments = tree_map(lambda leaf: places.get(id(leaf), -1), dict(arguments))
        self.asked = asked_sizes(self.arguments, self.leaves, dynamic_shapes) if dynamic_shapes is not None else []
        self.asked = self.asked or [{} for _ in self.leaves]

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """Where the number of tokens stands: second sizes of whole numbers (batch, length), and the same sizes elsewhere."""
        tensors = [(i, x) for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        tokens = {x.shape[1] for _, x in tensors if x.ndim == 2 and x.dtype in TOKEN_TYPES} - {1}
        return [(i, dim) for i, x in tensors for dim in range(1, x.ndim) if x.shape[dim] in tokens]

    def export(self, dynamic_batch: bool, free_lengths: bool = False) -> ExportedProgram:
        """Leave free what is asked for, and first sizes; torch.export fixes sizes of one, so a batch of one is doubled.

        One beside larger ones is no batch (a mask, a state), and stays one; so does what the model fixes when it is doubled.
        """
        batched = {i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.ndim > 0 and 0 not in self.asked[i]}
        batched = batched if dynamic_batch else set()
        first = batched | {i for i, sizes in enumerate(self.asked) if sizes.get(0) is not None}
        doubled = {i for i in first if self.leaves[i].shape[0] == 1}
        if doubled != first:
            doubled = set()
        while True:
            given = [torch.cat([x, x]) if i in doubled else x for i, x in enumerate(self.leaves)]
            free = [{dim: size for dim, size in sizes.items() if size is not None} for sizes in self.asked]
            for i, dim in [*((i, 0) for i in batched if given[i].shape[0] > 1), *(self.lengths if free_lengths else [])]:
                free[i][dim] = Dim.AUTO
            program = self._proved(given, free)
            stuck = {i for i in doubled & batched if isinstance(self._sizes_in(program, i)[0], int)}
            if not stuck:
                return program
            doubled -= stuck

    def names(self, program: ExportedProgram) -> dict[str, str]:
        """Return names for the free sizes of a program: those asked for, and "batch" for the first of the others."""
        names: dict[str, str] = {}
        for i, sizes in enumerate(self.asked):
            for dim, size in sizes.items():
                if size is not None and not _is_hint(size):
                    names.setdefault(str(self._sizes_in(program, i)[dim]), size.__name__)
        for i, leaf in enumerate(self.leaves):
            symbol = self._sizes_in(program, i)[0] if isinstance(leaf, Tensor) and leaf.ndim else 0
            if not isinstance(symbol, int) and str(symbol) not in names and "batch" not in names.values():
                names[str(symbol)] = "batch"
        for i, dim in self.lengths:
            symbol = self._sizes_in(program, i)[dim]
            if not isinstance(symbol, int) and str(symbol) not in names and "length" not in names.values():
                names[str(symbol)] = "length"
        return names

    def fixed_batches(self, program: ExportedProgram) -> list[str]:
        """Say of which inputs torch.export had to fix the first size, though nobody asked for that."""
        said = []
        for i, leaf in enumerate(self.leaves):
            if not isinstance(leaf, Tensor) or not leaf.ndim or 0 in self.asked[i]:
                continue
            if isinstance(size := self._sizes_in(program, i)[0], int):
                reason = "as in the example inputs, where others have more" if size == 1 else "by the model"
                said.append(f"the batch size of {program.graph_signature.user_inputs[i]} is fixed to {size} {reason}.")
        return said

    def _sizes_in(self, program: ExportedProgram, place: int) -> tuple[Any, ...]:
        name = program.graph_signature.user_inputs[place]
        return next(sizes_of(node.meta["val"]) for node in program.graph.find_nodes(op="placeholder") if node.name == name)

    def _proved(self, given: list[Any], free: list[Sizes]) -> ExportedProgram:
        """Export with a name for every free size: torch then has to prove that nothing depends on it.

        It can not where an operator's own formula for sizes asks something (a pool with ceil_mode, a window of one): there
        the program is held against the model on the sizes next to what was asked.
        """
        try:
            return self._named(given, free)
        except Exception as error:
            refusal = error
        relaxed = [{dim: Dim.AUTO if _is_plain(size) else size for dim, size in sizes.items()} for sizes in free]
        try:
            program = self._exported(given, relaxed)
        except Exception:
            raise refusal from None
        if not self._keeps_names(program, free):
            raise refusal
        self._check_choices(program, given, _hinted(relaxed), refusal)
        return program

    def _named(self, given: list[Any], free: list[Sizes]) -> ExportedProgram:
        hinted = _hinted(free)
        if not hinted:
            return self._exported(given, free)
        if len({i for i, _ in hinted}) == 1:  # nothing that other inputs' sizes could be equal to
            return self._exported(given, _with(free, {(i, dim): Dim(f"_size_{dim}") for i, dim in hinted}))
        return self._exported(given, _with(free, self._as_found(self._exported(given, free), free, hinted)))

    def _keeps_names(self, program: ExportedProgram, free: list[Sizes]) -> bool:
        """Whether every size that was asked for by a name is free, and equal to none of another name."""
        names: dict[str, Any] = {}
        asked = [(i, dim, size) for i, sizes in enumerate(free) for dim, size in sizes.items() if type(size) is Dim]
        symbols = [str(self._sizes_in(program, i)[dim]) for i, dim, _ in asked]
        return all(
            symbol.isidentifier() and names.setdefault(symbol, size) is size
            for symbol, (_, _, size) in zip(symbols, asked, strict=True)
        )

    def _as_found(
        self, program: ExportedProgram, free: list[Sizes], hinted: list[tuple[int, int]]
    ) -> dict[tuple[int, int], Any]:
        """Sizes that torch found to be the same get the same name, those that it fixed none."""
        named = {
            str(self._sizes_in(program, i)[dim]): size
            for i, sizes in enumerate(free)
            for dim, size in sizes.items()
            if not _is_hint(size)
        }
        found: dict[tuple[int, int], Any] = {}
        for i, dim in hinted:
            size = self._sizes_in(program, i)[dim]
            if isinstance(size, int):
                found[i, dim] = None
            elif str(size).isidentifier():
                found[i, dim] = named.setdefault(str(size), Dim(f"_{size}"))
        return found

    def _check_choices(
        self, program: ExportedProgram, given: list[Any], hinted: list[tuple[int, int]], refusal: Exception
    ) -> None:
        """Raise if there is a size with which the model gives another result than the program: it chose by that size."""
        places: dict[str, list[tuple[int, int]]] = {}
        for i, dim in hinted:
            size = self._sizes_in(program, i)[dim]
            if not isinstance(size, int) and str(size).isidentifier():
                places.setdefault(str(size), []).append((i, dim))
        graph = program.module(check_guards=False)
        for same in places.values():
            for other in _near(given[same[0][0]].shape[same[0][1]], str(refusal)):
                call = tree_unflatten(_resized(given, same, other), self.tree)
                expected = _result(self.module, call)
                if expected is not None and not _is_same(_result(graph, call), expected):
                    raise SizeChoiceError(f"the model chooses by it: {reason_of(refusal)}") from refusal

    def _exported(self, given: list[Any], free: list[Sizes]) -> ExportedProgram:
        args, kwargs = tree_unflatten(given, self.tree)
        shapes = tree_map(lambda place: (free[place] or None) if place >= 0 else None, self.arguments)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own, about its internals
            program = torch.export.export(self.module, args, kwargs, dynamic_shapes=shapes, strict=False)
            functional_program: ExportedProgram = program.run_decompositions({})  # takes nothing apart
            return functional_program


def _near(count: int, refusal: str) -> list[int]:
    """Sizes next to the example's and to the numbers of a refusal, where a condition on a size changes."""
    near = {n + step for n in (count, *map(int, re.findall(r"\d+", refusal))) for step in (-1, 0, 1)}
    return sorted(n for n in near - {count} if 1 <= n <= max(_TRIED, 4 * count))


def _with(free: list[Sizes], sizes: Mapping[tuple[int, int], Any]) -> list[Sizes]:
    """Put other sizes in their places; None: fixed."""
    made = [dict(part) for part in free]
    for (i, dim), size in sizes.items():
        made[i][dim] = size
    return [{dim: size for dim, size in part.items() if size is not None} for part in made]


def _resized(given: list[Any], places: list[tuple[int, int]], size: int) -> list[Any]:
    made = list(given)
    for i, dim in places:
        repeated = torch.cat([made[i]] * -(-size // made[i].shape[dim]), dim)
        made[i] = repeated.narrow(dim, 0, size)
    return made


def _result(module: nn.Module, call: Call) -> list[Tensor] | None:
    """The tensors of what a module gives, or None if it fails."""
    args, kwargs = copied(call)
    try:
        with torch.no_grad(), preserve_state(module.modules()):
            return [leaf for leaf in tree_leaves(module.forward(*args, **kwargs)) if isinstance(leaf, Tensor)]
    except Exception:
        return None


def _is_same(found: list[Tensor] | None, expected: list[Tensor]) -> bool:
    """Whether results are the same, but for rounding."""
    try:
        torch.testing.assert_close(found, expected, equal_nan=True)
    except AssertionError:
        return False
    return True


def reason_of(error: Exception) -> str:
    """Return what ``torch.export`` says in one line; of a size that can not be free, which and what would do."""
    lines = str(error).splitlines() or [type(error).__name__]
    if not lines[0].startswith("Constraints violated"):
        return lines[0]
    told = [line.strip(" -") for line in lines[1:] if line.startswith(("  - ", "  "))]
    return "; ".join(told) or lines[0]
