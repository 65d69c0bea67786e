"""A tree of tensors and plain data in one file: safetensors with a JSON header. Reading executes nothing.

The tree (dicts, lists, tuples, numbers, text, None and tensors, nested as you like) is JSON in the file's metadata; each
tensor in it is a reference by name. A SHA-256 over both says whether what is read is what was written.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pege_fx._utils.files import behind_links, path_of, path_to_read, replacement, scratch, while_replaced
from pege_fx.errors import CheckpointError
from pege_fx.serialization.codec import Codec, UnreadableError, stored
from pege_fx.serialization.memory_order import laid_out, order_of

PREVIOUS = ".previous"
FILE = Codec("tree", lambda name, value: f"\n{name} {value.dtype} {tuple(value.shape)}\n")


def previous_of(path: Path) -> Path:
    """Where ``write`` leaves the file that it replaces: beside it, and beside what a link points to."""
    path = behind_links(path) if os.path.islink(path) else path  # Path.is_symlink raises for a name that is too long
    return path.with_name(path.name + PREVIOUS)


def write(tree: Any, path: str | os.PathLike[str], kind: str) -> None:
    """Write a tree; whatever happens, ``path`` holds the old content or the new, and the old one stays beside it.

    The file is written under another name of its own, flushed to the disk and renamed; the one before is ``<path>.previous``.
    Several processes may write to one path.

    Raises:
        CheckpointError: if the tree holds something else than tensors and plain data, or the disk refuses.
    """
    path = path_of(path, CheckpointError)
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, "", tensors, {}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacement(path, _keep) as temporary:
            FILE.write(temporary, text, tensors, kind=kind)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can not write {path}: {error}.\n  what was there before is untouched.") from error


def read(path: str | os.PathLike[str], kind: str) -> Any:
    """Return the tree that ``write`` wrote; its tensors are on the CPU.

    Raises:
        CheckpointError: if there is no such file, or it is truncated, corrupt, or something else.
    """
    path = path_to_read(path, CheckpointError)
    return while_replaced(path, lambda: _read(path, kind), CheckpointError)


def _read(path: Path, kind: str) -> Any:
    try:
        found, tensors = FILE.read(path)
        if found.get("kind") != kind:
            raise CheckpointError(f"{path} is a safetensors file, but not a {kind}.{_hint(path)}")
        if not FILE.is_whole(found, tensors):
            raise CheckpointError(f"{path} is corrupt: its content is not what was written.{_hint(path)}")
        return _decode(json.loads(found["tree"]), tensors)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.{_hint(path)}") from error
    except (UnreadableError, KeyError, TypeError, ValueError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"{path} is truncated, or not a {kind}: {error}.{_hint(path)}") from error


def _hint(path: Path) -> str:
    before = previous_of(path)
    return f"\n  the one before it is {before}." if os.path.exists(before) else ""  # which raises for no path


def _keep(path: Path) -> None:
    """A second name for the old file, so that there is no moment without one."""
    with contextlib.suppress(OSError), scratch(path) as folder:  # a file system without hard links keeps none
        link = folder / path.name
        os.link(path, link)
        link.replace(previous_of(path))


# --- trees -------------------------------------------------------------------------------------------------------
# JSON has no tuple, no keys but text, and no tensor: {"tuple": [...]}, {"dict": [[key, value], ...]}, {"tensor": name}.
# Of a tensor that does not lie row by row: {"ordered": [name, dimensions]}; of a complex one: {"complex": its real view}.


def _encode(value: Any, name: str, tensors: dict[str, Tensor], known: dict[Any, str]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _encode_tensor(value, name, tensors, known)
    if isinstance(value, Mapping):
        for key in value:
            if not (key is None or isinstance(key, (bool, int, float, str))):
                raise CheckpointError(f"{name or 'the tree'} has the key {key!r}: keys are text or numbers.")
        pairs = value.items()
        return {"dict": [[key, _encode(child, f"{name}.{key}".lstrip("."), tensors, known)] for key, child in pairs]}
    if isinstance(value, (list, tuple)):
        children = [_encode(child, f"{name}.{i}".lstrip("."), tensors, known) for i, child in enumerate(value)]
        return children if isinstance(value, list) else {"tuple": children}
    raise CheckpointError(
        f"{name or 'the tree'} is a {type(value).__name__}: a checkpoint holds tensors, numbers, text, None, and lists, "
        "tuples and dicts of them."
    )


def _encode_tensor(value: Tensor, name: str, tensors: dict[str, Tensor], known: dict[Any, str]) -> Any:
    if value.layout is not torch.strided or value.is_meta:
        kind = "without data" if value.is_meta else f"in the layout {value.layout}"
        raise CheckpointError(f"{name or 'the tree'} is a tensor {kind}: a checkpoint holds dense ones.")
    value = value.detach().resolve_conj().resolve_neg()  # flags that no file has
    if value.is_complex():
        return {"complex": _encode_tensor(torch.view_as_real(value), name, tensors, known)}
    held, order = _name_of(value, name, tensors, known), order_of(value)
    return {"tensor": held} if order is None else {"ordered": [held, order]}


def _name_of(value: Tensor, name: str, tensors: dict[str, Tensor], known: dict[Any, str]) -> str:
    """Add a tensor to the file; one that is there already, as a tied weight is, keeps its first name."""
    where = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else name
    if where not in known:
        tensors[name] = stored(value)
        known[where] = name
    return known[where]


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(child, tensors) for child in value]
    if not isinstance(value, dict):
        return value
    ((what, content),) = value.items()
    if what == "tensor":
        return tensors[content].clone()  # what is read maps the file, and may be shared
    if what == "ordered":
        held, order = content
        return laid_out(tensors[held], order)
    if what == "complex":
        return torch.view_as_complex(_decode(content, tensors))
    if what == "tuple":
        return tuple(_decode(child, tensors) for child in content)
    if what == "dict":
        return dict(_pairs(content, tensors))
    raise ValueError(f"{what!r} is no part of a tree")


def _pairs(content: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Any, Any]]:
    for key, child in content:
        yield key, _decode(child, tensors)
