"""The one codec of files: safetensors, with a text of our own in the header and a checksum over both. Reading executes nothing.

Checkpoints and deployed models are such files. What their texts mean is in ``tensor_tree`` and in ``deployed``.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_CHECKSUM = "sha256"


class UnreadableError(Exception):
    """A file is truncated, or no safetensors file; the message says what safetensors found."""


@dataclass(frozen=True)
class Codec:
    """One kind of file.

    Attributes:
        label: under which the text stands in the header.
        describe: what the checksum covers of a tensor besides its bytes: name, dtype and shape. The two kinds of file spell it
            in two ways since their first version, and files from then can be read.
    """

    label: str
    describe: Callable[[str, Tensor], str]

    def write(self, path: Path, text: str, tensors: Mapping[str, Tensor], **labels: str) -> None:
        """Write a file as it is; for one that is whole or not there, give the path that ``_utils.files`` yields.

        Raises:
            OSError, SafetensorError: if the disk refuses.
        """
        save_file(dict(tensors), path, {**labels, self.label: text, _CHECKSUM: self.checksum(text, tensors)})

    def read(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Return the labels of a file and its tensors, which map the file and may be shared: copy what is written to.

        Raises:
            FileNotFoundError: if there is none.
            UnreadableError: if it is truncated, or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                labels = dict(file.metadata() or {})
                return labels, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
            raise UnreadableError(str(error)) from error

    def is_whole(self, labels: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether text and tensors are what was written."""
        return labels.get(_CHECKSUM) == self.checksum(labels[self.label], tensors)

    def checksum(self, text: str, tensors: Mapping[str, Tensor]) -> str:
        """Return the SHA-256 of the text and the tensors, in the order of their names."""
        sha = hashlib.sha256(text.encode())
        for name, value in sorted(tensors.items()):
            sha.update(self.describe(name, value).encode())
            sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()


def stored(value: Tensor) -> Tensor:
    """Return a dense tensor as a file holds it: on the CPU, row by row, in memory of its own size.

    Conjugated and negated ones are written out, since no file has such flags.
    """
    plain = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    # safetensors refuses tensors that share memory, and a view would bring all of its base along.
    whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    return plain if whole else plain.clone()
