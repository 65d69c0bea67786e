"""What several processes agree on: here the parts that need none of them."""

import pytest
import torch

from pege_fx import QuantSpec
from pege_fx._utils.collectives import gathered, on_first_rank, rank_and_size, whole
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.numerics.functional import fake_quantize, site_key, uniform

KEY = torch.tensor(site_key(0, "site"), dtype=torch.int32)


def continued(first: int) -> torch.Tensor:
    return torch.stack([KEY, torch.full_like(KEY, first)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_masks_of_parts_are_those_of_the_whole(layout: torch.memory_format) -> None:
    x = torch.randn(8, 16, 20, 20, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)  # large: a kernel
    spec, scale, rate = QuantSpec(bits=3), torch.tensor(0.3), torch.tensor(0.5)
    with torch.no_grad():
        one = fake_quantize(x, scale, spec, rate=rate, key=KEY)
        parts = [
            fake_quantize(part, scale, spec, rate=rate, key=continued(i * part.numel())) for i, part in enumerate(x.split(4))
        ]
        with eager_kernels():
            plain = fake_quantize(x[4:], scale, spec, rate=rate, key=continued(x[4:].numel()))
    assert torch.equal(torch.cat(parts), one)
    assert torch.equal(plain, parts[1])
    assert torch.equal(uniform(continued(6), (4,)), uniform(KEY, (10,))[6:])


def test_one_process_is_the_first_of_one() -> None:
    assert rank_and_size() == (0, 1)
    assert gathered("mine") == ["mine"]
    assert whole({"a": [1, (2,)]}) == {"a": [1, (2,)]}
    with pytest.raises(ZeroDivisionError):
        on_first_rank(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
