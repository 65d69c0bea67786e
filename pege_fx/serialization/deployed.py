"""Converted graphs as files: tensors in the safetensors format, the graph as JSON in its header, nothing else.

    {"format": "pege_fx", "version": 2, "name": ..., "replacement": rate p that training had reached,
     "nodes": [[name, op, target, args, kwargs], ...], "parameters": [...], "packed": {name: [bits, signed, shape]},
     "orders": {name: dimensions, from the slowest to the fastest in memory}}

A SHA-256 over that text and the tensors says whether what is read is what was written. Weight codes are packed to their
bits. A value of an argument that JSON does not have is an object with one key, its kind.
"""

import json
import keyword
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pege_fx._utils.files import atomic_write, path_to_read, while_replaced
from pege_fx.errors import CheckpointError, ExportError
from pege_fx.inspection.size import stored_codes
from pege_fx.modules.stages import graph_of, refuse_sparse
from pege_fx.numerics.packing import pack, unpack
from pege_fx.passes.graph import arguments, register_buffer, set_parameter, where
from pege_fx.serialization.allowlist import function_of, is_readable, methods, name_of
from pege_fx.serialization.codec import Codec, UnreadableError, stored
from pege_fx.serialization.memory_order import laid_out, order_of
from pege_fx.serialization.records import as_call, is_named_result

FORMAT, VERSION = "pege_fx", 2
FILE = Codec(FORMAT, lambda name, value: f"{name} {value.dtype} {list(value.shape)}")


def save_deployed(deployed: GraphModule, path: str | os.PathLike[str]) -> int:
    """Write a converted model to one file, weights packed to their bits; return the file's size in bytes.

    Needs no class of the model to be read again: a dataclass that ``forward`` returns comes back as a ``Record``, a named
    tuple as one of the same names. The file is whole or not there.

    Args:
        deployed: from ``convert``.
        path: of the file; ".safetensors" is a good ending.

    Raises:
        ExportError: if the graph calls what is not torch's (a module that stayed Python, a function of your own), if the
            model was not converted, or if the file can not be written.

    >>> import tempfile, pege_fx
    >>> gm = pege_fx.prepare(nn.Linear(4, 2), "W4A4", (torch.randn(2, 4),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save_deployed(pege_fx.convert(gm), f"{folder}/model.safetensors")
    ...     load_deployed(f"{folder}/model.safetensors")(torch.zeros(1, 4)).shape
    torch.Size([1, 2])
    """
    deployed = graph_of(deployed, "converted", error=ExportError)
    refuse_sparse(deployed, ExportError)
    tensors, packed = _packed_state(deployed)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": type(deployed).__name__,
        "replacement": deployed.meta.get("replacement", 1.0),
        "parameters": [name for name, _ in deployed.named_parameters()],
        "packed": packed,
        "orders": _orders(deployed),
        "nodes": [_encode_node(node) for node in deployed.graph.nodes],
    }
    with atomic_write(path) as temporary:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False)
        FILE.write(temporary, text, tensors)
        return temporary.stat().st_size


def load_deployed(path: str | os.PathLike[str]) -> GraphModule:
    """Read what ``save_deployed`` wrote: a GraphModule with the same outputs, bit for bit. Executes nothing of the file.

    Args:
        path: of what ``save_deployed`` wrote.

    Raises:
        CheckpointError: if the file is missing, broken, of another kind or from a newer version.

    >>> import tempfile
    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> deployed, x = pege_fx.convert(gm), torch.randn(2, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = pege_fx.save_deployed(deployed, f"{folder}/model.safetensors")
    ...     torch.equal(load_deployed(f"{folder}/model.safetensors")(x), deployed(x))
    True
    """
    path = path_to_read(path, CheckpointError)
    header, tensors = while_replaced(path, lambda: _read(path), CheckpointError)
    try:
        for name, (bits, signed, shape) in header["packed"].items():
            tensors[name] = unpack(tensors[name], shape, bits=bits, signed=signed)
        for name, order in header.get("orders", {}).items():
            tensors[name] = laid_out(tensors[name], order)
        gm = GraphModule(nn.Module(), Graph(), class_name=str(header["name"]))
        for name in header["parameters"]:
            set_parameter(gm, name, nn.Parameter(tensors[name]))
        parameters = set(header["parameters"])
        for name in (name for name in tensors if name not in parameters):
            register_buffer(gm, name, tensors[name])
        gm.graph = _decode_graph(header["nodes"], set(tensors))
        gm.graph.lint()
        gm.recompile()
        gm.meta["replacement"] = float(header.get("replacement", 1.0))
        return gm.eval()
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError, SyntaxError, OverflowError) as error:
        raise CheckpointError(f"{path} is broken: {type(error).__name__}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        found, tensors = FILE.read(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}.") from error
    except UnreadableError as error:
        raise CheckpointError(f"{path} is broken or no safetensors file: {error}") from error
    text = found.get(FORMAT)
    if text is None:
        raise CheckpointError(f"{path} holds tensors but no converted graph: write it with pege_fx.save_deployed.")
    try:
        header = json.loads(text)
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is broken: its header can not be read ({error}).") from error
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        advice = "update pege_fx" if newer else "store the model again with pege_fx.save_deployed"
        raise CheckpointError(f"{path} has format version {version}, this pege_fx reads {VERSION}: {advice}.")
    if not FILE.is_whole(found, tensors):
        raise CheckpointError(f"{path} is broken: its content is not what was written.")
    return header, tensors


def _packed_state(deployed: GraphModule) -> tuple[dict[str, Tensor], dict[str, tuple[int, bool, list[int]]]]:
    """Every tensor of the model by name, codes packed, and how."""
    codes = stored_codes(deployed)
    tensors: dict[str, Tensor] = {}
    packed = {}
    for name, value in [*deployed.named_parameters(), *deployed.named_buffers()]:
        tensors[name] = stored(value)
        found = codes.get(name)
        if found is not None and found.bits < 8 and not found.packed:
            packed[name] = (found.bits, value.dtype is torch.int8, list(value.shape))
            tensors[name] = pack(tensors[name], found.bits)
    return tensors, packed


def _orders(deployed: GraphModule) -> dict[str, list[int]]:
    """In which order of dimensions tensors lie in memory that do not lie row by row: convolutions compute in it."""
    named = [*deployed.named_parameters(), *deployed.named_buffers()]
    return {name: order for name, value in named if (order := order_of(value)) is not None}


# --- the graph as JSON ---------------------------------------------------------------------------------------


def _encode_node(node: Node) -> list[Any]:
    args, kwargs = arguments(node)
    if node.op == "call_module":
        raise ExportError(
            f"{node.name} calls the module {node.target}, which is code of its own{where(node)}: it can not be stored.\n"
            f"  {node.meta.get('stays_python', 'make it a function of tensors that torch.fx can trace')}"
        )
    called: Any = node.target
    if node.op == "call_function" and is_named_result(called):
        called, args, kwargs = *as_call(called, args, kwargs), {}
    target = name_of(called) if node.op == "call_function" else str(called)
    if target is None or (node.op == "call_method" and target not in methods()):
        raise ExportError(
            f"{node.name} calls {getattr(node.target, '__qualname__', node.target)}{where(node)}: only torch's own "
            "functions on tensors can be stored.\n  write it in torch's operations, so that torch.fx traces through it."
        )
    if node.target is getattr and not is_readable(*args[:2]):
        raise ExportError(f"{node.name} reads the attribute {args[1]!r}{where(node)}, which a stored graph may not.")
    return [node.name, node.op, target, _encode(args), _encode(kwargs)]


_KINDS: dict[type[Any], tuple[str, Callable[[Any], Any]]] = {
    Node: ("node", lambda value: value.name),
    tuple: ("tuple", lambda value: [_encode(part) for part in value]),
    torch.Size: ("tuple", lambda value: list(value)),
    dict: ("dict", lambda value: [[key, _encode(part)] for key, part in value.items()]),
    slice: ("slice", lambda value: [_encode(part) for part in (value.start, value.stop, value.step)]),
    type(...): ("ellipsis", lambda value: None),
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("device", str),
    torch.memory_format: ("memory_format", lambda value: str(value).removeprefix("torch.")),
}


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [_encode(part) for part in value]
    for kind, (name, encode) in _KINDS.items():
        if isinstance(value, kind):
            return {name: encode(value)}
    raise ExportError(f"an argument of type {type(value).__name__} can not be stored: {value!r}.")


def _decode_graph(rows: list[list[Any]], tensors: set[str]) -> Graph:
    graph = Graph()
    nodes: dict[str, Node] = {}
    for name, op, target, args, kwargs in rows:
        found: Any = target
        if op == "call_function":
            found = function_of(target)
        elif op == "call_method" and target not in methods():
            raise ValueError(f"{target!r} is not a method that a stored graph may call")
        elif op == "get_attr" and target not in tensors:
            raise KeyError(target)
        elif op not in ("placeholder", "get_attr", "output", "call_method"):
            raise ValueError(f"{op!r} is not an operation of a stored graph")
        decoded = _decode(args, nodes)
        named = _decode(kwargs, nodes)
        if not (isinstance(decoded, tuple) and isinstance(named, dict)):
            raise TypeError(f"{name} has no arguments")
        if found is getattr and not is_readable(*decoded[:2]):
            raise AttributeError(f"{decoded[1]!r} is not an attribute that a stored graph may read")
        _check_names(op, target, named)
        nodes[name] = graph.create_node(op, found, decoded, named, name=name)
    return graph


def _check_names(op: str, target: str, kwargs: dict[str, Any]) -> None:
    """fx writes these into Python code as they are: nothing but a name may be there."""
    arguments_named = [*kwargs, *([target.lstrip("*")] if op == "placeholder" else [])]
    for name in arguments_named:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"{name!r} is no name of an argument")
    if op == "get_attr" and not (target.isprintable() and not set(target) & set("\"'\\")):
        raise ValueError(f"{target!r} is no name of a tensor")


def _decode(value: Any, nodes: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(part, nodes) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind == "ellipsis":
        return ...
    if kind == "device":
        return torch.device(content)
    if kind in ("dtype", "memory_format"):
        found = getattr(torch, content)
        if not isinstance(found, (torch.dtype, torch.memory_format)):
            raise ValueError(f"torch.{content} is no {kind}")
        return found
    parts = [_decode(part, nodes) for part in content]
    if kind == "dict":
        return dict(parts)
    return slice(*parts) if kind == "slice" else tuple(parts)
