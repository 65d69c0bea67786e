"""A pytest plugin that imitates another processor: what a matrix product rounds to depends on how its operands lie in memory.

``python -m pytest -p tests.other_kernels`` (``make test-kernels``). Libraries choose another kernel, with another order of
summation, for another operation (``mm``, ``bmm``, ``addmm``), shape, layout or dtype. On one processor two of these choices
may give equal bits by chance, on the next one they do not: AMX, for one. Here every choice rounds in its own direction, so
that a test which compares bits of two computations fails unless both sides make the same calls. What is exact (small whole
numbers, powers of two) stays exact, as it does on every processor.
"""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

PRODUCTS = (
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "convolution", "convolution_backward", "_grouped_mm",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip
_BITS = {
    torch.float64: 20,
    torch.float32: 10,
    torch.float16: 4,
    torch.bfloat16: 2,
}  # what is exact has no more behind the point
# These compare with other processes, which round as this processor does.
_WITH_OTHER_PROCESSES = (
    "test_n_processes_train_as_one_does_on_the_global_batch",
    "test_a_file_is_read_without_the_code_that_made_it",
)
_LIBRARY = torch.library.Library("aten", "IMPL")


def pytest_configure() -> None:
    """Put every product behind its imitation, for all threads of this process."""
    for name in PRODUCTS:
        _LIBRARY.impl(name, _other(name), "CPU", with_keyset=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what can not agree."""
    for item in items:
        if item.name.split("[")[0] in _WITH_OTHER_PROCESSES:
            item.add_marker(pytest.mark.skip(reason="compares with processes that round as this processor does"))


def _other(name: str) -> Any:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
        found = kernel.call_boxed(keys, *args, **kwargs)
        tensors = [value for value in args if isinstance(value, Tensor)]
        choice = repr((name, [(value.shape, value.stride(), value.dtype) for value in tensors]))
        seed = int.from_bytes(hashlib.sha256(choice.encode()).digest()[:8], "little", signed=True)
        if isinstance(found, Tensor):
            return _moved(found, seed)
        return tuple(_moved(value, seed) for value in found)

    return call


def _moved(found: Any, seed: int) -> Any:
    """Move what is rounded by a unit in the last place, up or down as the choice has it."""
    if not isinstance(found, Tensor) or found.dtype not in _BITS:
        return found
    generator = torch.Generator().manual_seed(seed)
    moved = found * (1 + (torch.randint(3, found.shape, generator=generator).to(found) - 1) * torch.finfo(found.dtype).eps)
    steps = found * 2.0 ** _BITS[found.dtype]  # a number with few bits is likely to be exact
    return torch.where(steps == steps.round(), found, moved)
