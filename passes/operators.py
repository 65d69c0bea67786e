"""What an operation with quantizable edges is: one entry for each, which every pass, cost, engine and file asks.

To quantize one more operation, ``register`` an entry; a writer in ``pege_fx.export`` exports it. Nothing else has to know it.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pege_fx.decompositions.recurrent import recurrent
from pege_fx.errors import ModelError
from pege_fx.numerics.recompute import variant_of
from pege_fx.numerics.spec import Channels
from pege_fx.passes.op_traits import TRAITS, UNKNOWN, OpTraits

Shape: TypeAlias = tuple[int, ...]
# From the result's shape and the arguments by name (shapes of tensors, other values as they are) to multiply-accumulates.
Count: TypeAlias = Callable[[Shape, Mapping[str, Any]], int]
# From an operand's name, the weight that it reads and the number of groups to where its output channels are; None: nowhere.
FindChannels: TypeAlias = Callable[[str, Tensor, int], Channels | None]


def _no_channels(name: str, weight: Tensor, groups: int) -> Channels | None:
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Operator:
    """An operation whose operands can be quantized.

    Attributes:
        name: in policies, tables and node names.
        functions: what a graph may call, one meaning under several names; the first stands for all.
        methods: of a tensor, with the tensor as the first parameter.
        module: torch's layer that is this operation on its own parameters.
        traits: what passes may assume of the functions that ``op_traits`` does not know yet.
        in_place: a function or method that overwrites its first operand, and the one that does not.
        parameters: the leading parameters by name (builtin functions have no signature to ask).
        inputs: which of them carry activations. Of a parameter "tensors" every item is an operand.
        weights: which of them carry weights.
        products: multiply-accumulates of a call.
        channels: where a weight keeps its output channels.
        channel_axis: the axis of the result along which output channels lie.
        channels_first: features of an input lie along axis 1, and not along its last.
        transposed: a convolution that spreads each input over a filter.
        integer: how the reference engine runs it: a "layer" has a bias, a "product" none; None: in float.
        on_request: only a rule that names it quantizes it; all its tensors are inputs then, parameters too.
        takes_proxies: the functions ask their arguments for ``__torch_function__``, as torch's should; tracing replaces others.
        recomputes: backward keeps operands, so that a variant which makes quantized ones again is of use.
    """

    name: str
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    module: type[nn.Module] | None = None
    traits: OpTraits = UNKNOWN
    in_place: Mapping[Any, Any] = field(default_factory=dict)
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    products: Count
    channels: FindChannels = _no_channels
    channel_axis: int = -1
    channels_first: bool = False
    transposed: bool = False
    integer: Literal["layer", "product"] | None = None
    on_request: bool = False
    takes_proxies: bool = True
    recomputes: bool = True


# --- multiply-accumulates --------------------------------------------------------------------------------------


def _of_convolution(result: Shape, given: Mapping[str, Any]) -> int:
    """Each output element sums over one filter."""
    filter_size: int = math.prod(given["weight"][1:])
    return math.prod(result) * filter_size


def _of_transposed(result: Shape, given: Mapping[str, Any]) -> int:
    """Each input element is spread over one filter."""
    filter_size: int = math.prod(given["weight"][1:])
    return int(math.prod(given["input"])) * filter_size


def _of_product(first: str) -> Count:
    """Each output element of a matrix product sums over the last dimension of its first operand."""
    return lambda result, given: math.prod(result) * int(given[first][-1])


def _of_attention(result: Shape, given: Mapping[str, Any]) -> int:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    scores: int = math.prod(query[:-1]) * key[-2]
    return scores * int(query[-1] + value[-1])


def _of_einsum(result: Shape, given: Mapping[str, Any]) -> int:
    """The product of all sizes; dimensions behind an ellipsis count once."""
    equation = str(given["equation"]).replace(" ", "").partition("->")[0]
    sizes: dict[Any, int] = {}
    for term, name in zip(equation.split(","), ("a", "b", "c", "d"), strict=False):
        shape = given[name]
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        labels = [*before, *(range(-hidden, 0) if dots else ()), *after]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values())


def _nothing(result: Shape, given: Mapping[str, Any]) -> int:
    return 0  # a look-up, or no product at all


# --- output channels -------------------------------------------------------------------------------------------


def _rows(name: str, weight: Tensor, groups: int) -> Channels:
    return Channels(weight.shape[0])


def _columns_of_groups(name: str, weight: Tensor, groups: int) -> Channels:
    return Channels(weight.shape[1] * groups, axis=1, groups=groups)


def _of_factor(left: str) -> FindChannels:
    """Rows of the left factor, columns of the right one."""

    def find(name: str, weight: Tensor, groups: int) -> Channels | None:
        if weight.ndim != 2:
            return None
        return Channels(weight.shape[0]) if name == left else Channels(weight.shape[1], axis=1)

    return find


def _of_experts(name: str, weight: Tensor, groups: int) -> Channels | None:
    """Experts' matrices, stacked, have one channel each."""
    return Channels(weight.shape[0]) if weight.ndim == 3 else _of_factor("mat_a")(name, weight, groups)


# --- the table -------------------------------------------------------------------------------------------------


def _convolution(dims: int) -> Operator:
    return Operator(
        name=f"conv{dims}d",
        functions=(getattr(F, f"conv{dims}d"),),
        module=getattr(nn, f"Conv{dims}d"),
        parameters=("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
        inputs=("input",),
        weights=("weight",),
        products=_of_convolution,
        channels=_rows,
        channel_axis=1,
        channels_first=True,
        integer="layer",
    )


def _transposed_convolution(dims: int) -> Operator:
    return Operator(
        name=f"conv_transpose{dims}d",
        functions=(getattr(F, f"conv_transpose{dims}d"),),
        module=getattr(nn, f"ConvTranspose{dims}d"),
        parameters=("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
        inputs=("input",),
        weights=("weight",),
        products=_of_transposed,
        channels=_columns_of_groups,
        channel_axis=1,
        channels_first=True,
        transposed=True,
        integer="layer",
    )


def _product(name: str, parameters: tuple[str, ...], *functions: Any, integer: bool = False) -> Operator:
    """A matrix product; what is added to it is no operand."""
    factors = parameters[-2:]
    return Operator(
        name=name,
        functions=functions,
        methods=(name, "__matmul__") if name == "matmul" else (name,),
        parameters=parameters,
        inputs=factors,
        products=_of_product(factors[0]),
        channels=_of_factor(factors[0]),
        integer="product" if integer else None,
    )


def _elementwise(name: str, functions: tuple[Any, ...], methods: tuple[str, ...], in_place_operator: Any) -> Operator:
    return Operator(
        name=name,
        functions=functions,
        methods=methods,
        in_place={in_place_operator: functions[0]} | {f"{method}_": method for method in methods},
        parameters=("input", "other"),
        inputs=("input", "other"),
        products=_nothing,
        on_request=True,
        recomputes=name == "mul",  # a sum keeps nothing for backward
    )


def _side_by_side(name: str, *functions: Any) -> Operator:
    return Operator(
        name=name,
        functions=functions,
        parameters=("tensors", "dim"),
        inputs=("tensors",),
        products=_nothing,
        on_request=True,
        recomputes=False,
    )


_OPERATORS = [
    *map(_convolution, (1, 2, 3)),
    *map(_transposed_convolution, (1, 2, 3)),
    Operator(
        name="linear",
        functions=(F.linear,),
        module=nn.Linear,
        parameters=("input", "weight", "bias"),
        inputs=("input",),
        weights=("weight",),
        products=_of_convolution,
        channels=_rows,
        integer="layer",
    ),
    Operator(
        name="embedding",
        functions=(F.embedding,),
        module=nn.Embedding,
        parameters=("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        inputs=(),
        weights=("weight",),
        products=_nothing,
        channels=_rows,
    ),
    Operator(
        name="embedding_bag",
        functions=(F.embedding_bag,),
        module=nn.EmbeddingBag,
        parameters=("input", "weight", "offsets"),
        inputs=(),
        weights=("weight",),
        products=_nothing,
        channels=_rows,
    ),
    Operator(
        name="bilinear",
        functions=(F.bilinear,),
        module=nn.Bilinear,
        parameters=("input1", "input2", "weight", "bias"),
        inputs=("input1", "input2"),
        weights=("weight",),
        products=_of_convolution,
        channels=_rows,
    ),
    _product("matmul", ("input", "other"), torch.matmul, operator.matmul, integer=True),
    _product("mm", ("input", "mat2"), torch.mm, integer=True),
    _product("bmm", ("input", "mat2"), torch.bmm, integer=True),
    _product("addmm", ("input", "mat1", "mat2"), torch.addmm),
    _product("baddbmm", ("input", "batch1", "batch2"), torch.baddbmm),
    Operator(
        name="grouped_mm",
        functions=(F.grouped_mm,),
        parameters=("mat_a", "mat_b"),
        inputs=("mat_a", "mat_b"),
        products=_of_product("mat_a"),
        channels=_of_experts,
        takes_proxies=False,
    ),
    Operator(
        name="einsum",
        functions=(torch.einsum,),
        parameters=("equation", "a", "b", "c", "d"),
        inputs=("a", "b", "c", "d"),
        products=_of_einsum,
    ),
    Operator(
        name="scaled_dot_product_attention",
        functions=(F.scaled_dot_product_attention,),
        parameters=("query", "key", "value", "attn_mask"),
        inputs=("query", "key", "value"),
        products=_of_attention,
    ),
    _elementwise("add", (operator.add, torch.add), ("add",), operator.iadd),
    _elementwise("sub", (operator.sub, torch.sub, torch.subtract), ("sub", "subtract"), operator.isub),
    _elementwise("mul", (operator.mul, torch.mul, torch.multiply), ("mul", "multiply"), operator.imul),
    _side_by_side("cat", torch.cat, torch.concat, torch.concatenate),
    _side_by_side("stack", torch.stack),
]

# What a graph calls, and the entry that it is: functions (variants that recompute too), and methods.
FUNCTIONS: dict[Any, Operator] = {}
METHODS: dict[str, Operator] = {}
# A function or method, and the variant that makes quantized operands again in backward.
RECOMPUTING: dict[Any, Callable[..., Any]] = {}
OUT_OF_PLACE: dict[Any, Any] = {}
MODULES: dict[type[nn.Module], Operator] = {}


def register(entry: Operator) -> None:
    """Make an operation known: its operands are quantized from now on, as policies say.

    A function of your own must be one node of the graph: ``torch.fx.wrap`` it. docs/extending.md leads through it.

    Args:
        entry: what the operation is; its functions and methods must be new.

    Raises:
        ModelError: if another entry has one of its names, functions or methods.

    >>> import torch
    >>> FUNCTIONS[torch.nn.functional.linear].weights
    ('weight',)
    """
    targets = [*entry.functions, *entry.methods, *entry.in_place]
    table: dict[Any, Operator] = {**FUNCTIONS, **METHODS}
    for known in table.values():
        if known.name == entry.name or any(table.get(target) is known for target in targets):
            raise ModelError(f"an operation {known.name!r} is there already: give another name, and functions of its own.")
    places = [target for target in entry.in_place if isinstance(target, str)]
    METHODS.update(dict.fromkeys((*entry.methods, *places), entry))
    FUNCTIONS.update(dict.fromkeys((*entry.functions, *(t for t in entry.in_place if not isinstance(t, str))), entry))
    OUT_OF_PLACE.update(entry.in_place)
    if entry.module is not None:
        MODULES[entry.module] = entry
    for function in entry.functions:
        TRAITS.setdefault(function, entry.traits)
    variant = next(filter(None, map(variant_of, entry.functions)), None) if entry.recomputes else None
    if variant is not None:
        FUNCTIONS[variant] = entry
        RECOMPUTING.update(dict.fromkeys((*entry.functions, *entry.methods), variant))


for _entry in _OPERATORS:
    register(_entry)


def operators() -> Iterator[Operator]:
    """Yield every operation that is known, each once."""
    yield from dict.fromkeys(FUNCTIONS.values())


def targets_of(name: str) -> frozenset[str]:
    """Return the names of the functions and methods that are the operation of this name."""
    functions = [function.__name__ for function, found in FUNCTIONS.items() if found.name == name]
    return frozenset(functions + [method for method, found in METHODS.items() if found.name == name])


def recurrent_layer(kind: str, arguments: Mapping[str, Any]) -> Operator:
    """Return the entry of a call of ``recurrent``: its weights are the arguments that this kind of layer has."""
    return Operator(
        name=kind,
        functions=(recurrent,),
        parameters=("input", "hx"),
        inputs=("input",),
        weights=tuple(name for name in arguments if name.startswith("weight_")),
        products=_of_product("input"),
        channels=_rows,
        recomputes=False,
    )
