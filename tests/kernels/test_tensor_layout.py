"""Which tensors the kernels written by hand may read, and as what. Meta tensors have a layout too, and no memory to fill."""

import pytest
import torch
from torch import Tensor, nn

from pege_fx.kernels.tensor_layout import TOO_LARGE, Layout, layout_of

FLAT, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def seen(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *numbers: Tensor | None) -> Layout | None:
    return layout_of(x, (scale, zero_point), (torch.float32, torch.bfloat16), *numbers)


SERVED: dict[str, tuple[Tensor, Tensor, tuple[object, ...]]] = {
    "flat": (meta(2, 3, 4), meta(), (FLAT, False, 1, 1, 24)),
    "one number with dimensions": (meta(2, 3, 4), meta(1, 1), (FLAT, False, 1, 1, 24)),
    "rows": (meta(2, 3, 4), meta(2, 1, 1), (FLAT, True, 2, 1, 12)),
    "rows of one": (meta(3), meta(3), (FLAT, True, 3, 1, 1)),
    "a parameter": (nn.Parameter(meta(2, 3)), nn.Parameter(meta()), (FLAT, False, 1, 1, 6)),
    "channels_last": (meta(2, 3, 4, 5).contiguous(memory_format=LAST), meta(), (LAST, False, 2, 20, 3)),
    "channels_last with rows": (meta(2, 3, 4, 5).contiguous(memory_format=LAST), meta(2, 1, 1, 1), (LAST, True, 2, 20, 3)),
    "channels_last_3d": (meta(2, 3, 4, 5, 6).contiguous(memory_format=LAST_3D), meta(), (LAST_3D, False, 2, 120, 3)),
    "the largest": (meta(TOO_LARGE - 1), meta(), (FLAT, False, 1, 1, TOO_LARGE - 1)),
    "half types": (meta(2, 3, dtype=torch.bfloat16), meta(2, 1, dtype=torch.float16), (FLAT, True, 2, 1, 3)),
}
REFUSED: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {
    "another dtype": (meta(2, 3, dtype=torch.float64), meta(), None),
    "nothing": (meta(0, 3), meta(), None),
    "too large": (meta(TOO_LARGE), meta(), None),
    "more than too large": (meta(TOO_LARGE + 1), meta(), None),
    "more than one to a row": (meta(4, 2), meta(4, 2), None),
    "one to a column": (meta(4, 4), meta(1, 4), None),
    "fewer scales than rows": (meta(4, 2), meta(2, 1), None),
    "a scale with fewer dimensions": (meta(4, 4), meta(4), None),
    "a scale with more dimensions": (meta(4), meta(1, 1), None),
    "a scale of nothing": (meta(4), meta(0), None),
    "a scale in float64": (meta(4), meta(dtype=torch.float64), None),
    "a scale that is not dense": (meta(4, 2), meta(4, 2)[:, :1], None),
    "a scale elsewhere": (meta(4), torch.ones(()), None),
    "a zero point of another shape": (meta(4), meta(), meta(1)),
    "a zero point of whole numbers": (meta(4), meta(), meta(dtype=torch.int32)),
    "not dense": (meta(4, 8)[:, ::2], meta(), None),
    "transposed": (meta(4, 8).T, meta(), None),
}


@pytest.mark.parametrize("case", SERVED)
def test_what_a_kernel_sees(case: str) -> None:
    x, scale, wanted = SERVED[case]
    assert seen(x, scale) == wanted
    assert seen(x, scale, torch.empty_like(scale), None, meta(2)) == wanted


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_kernel_serves(case: str) -> None:
    assert seen(*REFUSED[case]) is None


def test_what_else_is_read_lies_beside_it_and_is_plain() -> None:
    class Mine(Tensor):
        pass

    assert seen(meta(4), meta(), None, torch.ones(())) is None
    assert seen(meta(4), meta(), None, meta().as_subclass(Mine)) is None


def test_the_last_number_of_a_piece_is_an_int32() -> None:
    assert TOO_LARGE + 2**12 == 2**31
