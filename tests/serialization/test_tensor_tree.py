"""Files of tensors and plain data: what goes in comes out, atomically, and nothing else is taken for one."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pege_fx.errors import CheckpointError
from pege_fx.serialization import tensor_tree
from pege_fx.testing import tensors

KIND = "test file"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    tensors(),
    DTYPES.map(lambda dtype: torch.ones(3, 2).to(dtype)),
    st.just(torch.tensor(2.5)),
    st.just(torch.empty(0, 4)),
)
KEYS = st.one_of(st.text(max_size=3), st.integers())
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("container") / "state"


@given(TREES)
def test_what_goes_in_comes_out(place: Path, tree: Any) -> None:
    tensor_tree.write(tree, place, KIND)
    assert same(tensor_tree.read(place, KIND), tree)


def test_numbers_that_json_does_not_have_come_out_too(tmp_path: Path) -> None:
    tensor_tree.write([float("nan"), float("inf"), -0.0, 0.1], tmp_path / "x", KIND)
    got = tensor_tree.read(tmp_path / "x", KIND)
    assert got[0] != got[0]
    assert [str(value) for value in got[1:]] == ["inf", "-0.0", "0.1"]


def test_tied_tensors_are_stored_once_and_views_alone(tmp_path: Path) -> None:
    base = torch.arange(10_000, dtype=torch.float32)
    rows = {"row": base[:10], "next": base[5:15]}
    tree = {"one": base, "tied": base, **rows, "every other": base[::2], "turned": base.view(100, 100).t()}
    tensor_tree.write(tree, tmp_path / "x", KIND)
    assert same(tensor_tree.read(tmp_path / "x", KIND), tree)
    assert (tmp_path / "x").stat().st_size < 4 * (10_000 + 10 + 5_000 + 10_000) + 4096


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": [1, {2, 3}]}, r"a\.1 is a set: a checkpoint holds tensors, numbers"),
        ({"a": object}, "a is a type"),
        ({("a", 1): 0}, r"the tree has the key \('a', 1\): keys are text or numbers"),
    ],
)
def test_anything_else_is_refused_and_nothing_is_written(tmp_path: Path, tree: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        tensor_tree.write(tree, tmp_path / "x", KIND)
    assert not list(tmp_path.iterdir())


def test_the_file_before_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for i in range(3):
        tensor_tree.write(i, path, KIND)
    assert tensor_tree.read(path, KIND) == 2
    assert tensor_tree.read(tensor_tree.previous_of(path), KIND) == 1
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("broken", ["fsync", "link"])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "x"
    tensor_tree.write("old", path, KIND)

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, broken, fail)
    if broken == "fsync":
        with pytest.raises(CheckpointError, match=r"can not write .*: no space left\.\n  what was there before"):
            tensor_tree.write("new", path, KIND)
    else:  # a file system without hard links: it works, and keeps none
        tensor_tree.write("new", path, KIND)
    assert tensor_tree.read(path, KIND) == ("old" if broken == "fsync" else "new")
    assert len(list(tmp_path.iterdir())) == 1


# --- files that are something else -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "x"
    tensor_tree.write({"weight": torch.randn(30, 4), "steps": [1, 2, 3]}, path, KIND)
    return path.read_bytes()


@given(st.data())
def test_a_changed_byte_anywhere_is_noticed(place: Path, good: bytes, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[position] ^= data.draw(st.integers(1, 255))
    place.write_bytes(changed)
    with pytest.raises(CheckpointError):
        tensor_tree.read(place, KIND)


@given(st.data())
def test_a_truncated_file_is_noticed(place: Path, good: bytes, data: st.DataObject) -> None:
    place.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(CheckpointError, match="truncated, or not a test file"):
        tensor_tree.read(place, KIND)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    with pytest.raises(CheckpointError):
        tensor_tree.read(place, KIND)


def with_header(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header


HUGE = {"w": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}, "__metadata__": {"kind": KIND}}


@pytest.mark.parametrize(
    "content",
    [
        with_header(b"{}", 1 << 62),  # a header larger than any memory
        with_header(b"{}", 50_000_000),
        with_header(json.dumps(HUGE).encode()),  # a tensor larger than any memory
        with_header(b"[" * 100_000),
    ],
)
def test_sizes_in_a_header_are_not_believed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated, or not a test file"):
        tensor_tree.read(tmp_path / "x", KIND)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Bomb()}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="truncated, or not a test file"):
        tensor_tree.read(tmp_path / "x", KIND)
    assert not (tmp_path / "executed").exists()


def test_a_tree_that_does_not_fit_its_tensors_or_is_too_deep_is_refused(tmp_path: Path) -> None:
    for text in ('{"tensor": "elsewhere"}', '{"run": "this"}', '{"a": 1, "b": 2}', "[" * 5000 + "]" * 5000, "{"):
        value = {"w": torch.ones(2)}
        found = {"kind": KIND, "tree": text, "sha256": tensor_tree.FILE.checksum(text, value)}
        save_file(value, tmp_path / "x", found)
        with pytest.raises(CheckpointError):
            tensor_tree.read(tmp_path / "x", KIND)


def test_other_files_are_named_for_what_they_are_not(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is a safetensors file, but not a test file\.$"):
        tensor_tree.read(tmp_path / "weights.safetensors", KIND)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        tensor_tree.read(tmp_path / "nowhere", KIND)
    with pytest.raises(CheckpointError, match="is a folder, a pipe or a device: give a file"):
        tensor_tree.read(tmp_path, KIND)


def test_the_error_names_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tensor_tree.write("first", path, KIND)
    tensor_tree.write("second", path, KIND)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"truncated[\s\S]*the one before it is .*x\.previous"):
        tensor_tree.read(path, KIND)
    assert tensor_tree.read(tensor_tree.previous_of(path), KIND) == "first"
