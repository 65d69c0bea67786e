"""The codec of files: what it writes it reads, and nothing else of the package knows the format."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pege_fx.serialization import deployed, tensor_tree
from pege_fx.serialization.codec import Codec, UnreadableError, stored

ROOT = Path(__file__).parents[2]
FILES = {"checkpoint": tensor_tree.FILE, "deployed": deployed.FILE}


@pytest.mark.parametrize("codec", FILES.values(), ids=FILES)
def test_text_and_tensors_are_read_as_written(codec: Codec, tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6).view(2, 3), "a": torch.tensor([1.5, float("nan")]), "empty": torch.zeros(0, 4)}
    codec.write(tmp_path / "x", "text", tensors, kind="test")
    labels, found = codec.read(tmp_path / "x")
    assert (labels[codec.label], labels["kind"]) == ("text", "test")
    assert codec.is_whole(labels, found)
    for name, value in tensors.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "altered",
    [
        {"a": torch.tensor([1.0, 2.5])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"b": torch.tensor([1.0, 2.0])},
    ],
)
@pytest.mark.parametrize("codec", FILES.values(), ids=FILES)
def test_another_value_shape_dtype_or_name_is_another_content(codec: Codec, altered: dict[str, Tensor]) -> None:
    tensors = {"a": torch.tensor([1.0, 2.0])}
    labels = {codec.label: "text", "sha256": codec.checksum("text", tensors)}
    assert codec.is_whole(labels, tensors)
    assert not codec.is_whole(labels, altered)
    assert not codec.is_whole(labels | {codec.label: "other"}, tensors)


def test_what_is_no_safetensors_file_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no tensors at all")
    with pytest.raises(UnreadableError):
        tensor_tree.FILE.read(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        tensor_tree.FILE.read(tmp_path / "y")


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(4, 4)[1:, ::2],
        torch.randn(3, 4).t(),
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.imag(torch.tensor([1 + 2j, 3j]).conj()),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(1).expand(3),
    ],
    ids=["part", "transposed", "conjugated", "negated", "parameter", "expanded"],
)
def test_what_is_stored_is_plain_and_equal(value: Tensor) -> None:
    found = stored(value)
    torch.testing.assert_close(found, value.detach().resolve_conj().resolve_neg(), rtol=0, atol=0)
    assert found.is_contiguous()
    assert (found.is_conj(), found.is_neg(), found.requires_grad) == (False, False, False)
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


def test_one_file_knows_the_format() -> None:
    """``safetensors`` is imported by the codec alone, but for the class of its errors."""
    importing = set()
    for path in [*(ROOT / "pege_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.ImportFrom) else []
            if (isinstance(node, ast.ImportFrom) and node.module == "safetensors" and names != ["SafetensorError"]) or (
                isinstance(node, ast.ImportFrom) and node.module == "safetensors.torch"
            ):
                importing.add(path.name)
    assert importing == {"codec.py"}


def test_one_file_moves_files_into_their_place() -> None:
    """What writes a user's file asks ``_utils.files``, so that it is whole or not there; kernels are compiled beside theirs."""
    moving = {
        path.name
        for path in [*(ROOT / "pege_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.replace", "os.rename", "shutil.move")
    }
    assert moving <= {"files.py", "c_kernels.py"}
