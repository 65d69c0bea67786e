"""The masks of progressive replacement: u of every element from a counter hash, the same in every way to compute."""

import zlib

import torch
from torch import Tensor

_MIX_1, _MIX_2 = 0x21F0AAAD, 0xD35A2D97
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: multiples of it lie as evenly apart as any
_BITS_OF_U = 24  # what float32 holds exactly


def as_int32(value: int) -> int:
    """The signed 32-bit integer with the same bits as ``value`` mod 2**32."""
    return (value + 2**31) % 2**32 - 2**31


def mix32(value: int) -> int:
    """Mix a 32-bit integer (lowbias32's finalizer with its improved constants), as Python integers.

    >>> mix32(0), mix32(1)
    (0, 114555507)
    """
    value &= 0xFFFFFFFF
    value = ((value ^ value >> 16) * _MIX_1) & 0xFFFFFFFF
    value = ((value ^ value >> 15) * _MIX_2) & 0xFFFFFFFF
    return value ^ value >> 15


def site_key(seed: int, site: str) -> int:
    """Return the hash key of a site as a signed 32-bit integer, from the run's seed and the site's name."""
    return as_int32(mix32(mix32(zlib.crc32(site.encode())) ^ mix32(seed + 0x9E3779B9)))


def refresh_key(refresh: int) -> int:
    """Return what a refresh count (0, 1, ...) adds to every site's key, as a signed 32-bit integer."""
    return as_int32(mix32(refresh * 0x9E3779B9))


def _hashed(number: Tensor, key: Tensor) -> Tensor:
    """The hash of every element's number (int32) under a 0-d key, see ``uniform``.

    ``mix32`` of consecutive numbers is correlated (r = 0.02 at some lags): its first round barely spreads differences in
    the upper bits. Multiples of ``_GOLDEN`` leave no two elements of a tensor that differ in so few. The key between the
    rounds keeps two keys from giving one sequence, moved along. ``>>`` keeps the sign: the masks make it a logical shift.
    """
    bits = (number + key) * as_int32(_GOLDEN)
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * as_int32(_MIX_1)
    bits = (bits ^ (bits >> 15 & 0x1FFFF) ^ (key * as_int32(_GOLDEN))) * as_int32(_MIX_2)
    return bits ^ (bits >> 15 & 0x1FFFF)


def uniform(key: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the u of every element: float32 in [0, 1) in steps of 2**-24.

    Element i (counted in row-major order whatever the memory layout) gets the upper bits of ``mix32((i + key) * G)`` with
    ``key * G`` xored in between its two rounds, G = 0x9E3779B9: a function of the key and of i alone, hence the same in
    eager and compiled code, on every device, in every recomputation. No two elements are correlated.

    Args:
        key: int32 tensor, see ``site_key`` and ``refresh_key``: 0-d, or two of which the second is the number of the first
            element, for a part of something larger.
        shape: shape of the result; the result is on the key's device.
    """
    return _top_bits(row_major_index(shape, key.device), key).to(torch.float32) * 2.0**-_BITS_OF_U


def row_major_index(shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Number the elements of a shape: 0, 1, ... in row-major order, int32."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)


def index_like(x: Tensor) -> Tensor:
    """``row_major_index`` in the memory layout of ``x``: what is made from it should look like what it would be without us."""
    return torch.zeros_like(x, dtype=torch.int32) + row_major_index(x.shape, x.device)


def channels_last_index(x: Tensor) -> Tensor:
    """``row_major_index`` of a tensor (batch, channels, positions), given as ``x`` (batch, positions, channels)."""
    batch, position, channel = (
        torch.arange(size, dtype=torch.int32, device=x.device).view(shape)
        for size, shape in zip(x.shape, ((-1, 1, 1), (-1, 1), (-1,)), strict=True)
    )
    return (batch * x.shape[2] + channel) * x.shape[1] + position


def _top_bits(index: Tensor, key: Tensor) -> Tensor:
    """2**24 * u of the elements with these numbers, int32."""
    bits = _hashed(index, key) if key.ndim == 0 else _hashed(index + key[1], key[0])
    top: Tensor = bits >> (32 - _BITS_OF_U) & (2**_BITS_OF_U - 1)
    return top


def is_replaced(index: Tensor, key: Tensor, rate: Tensor) -> Tensor:
    """u < p, compared as integers: a conversion for each element would cost more than the comparison."""
    replaced: Tensor = _top_bits(index, key) < torch.ceil(rate.to(torch.float32) * 2**_BITS_OF_U).to(torch.int32)
    return replaced


def replacement_mask(key: Tensor, rate: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the mask m = 1[u < p] as bools: True where the quantized value replaces the continuous one."""
    return is_replaced(row_major_index(shape, key.device), key, rate)
