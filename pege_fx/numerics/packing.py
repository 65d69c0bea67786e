"""Codes in as many bits as they need, and biases as 32-bit integers.

Codes of b bits are one little-endian stream: code i, in two's complement, lies in bits b*i ... b*i + b - 1, and bit k of
the stream is bit k mod 8 (the lowest is 0) of byte k // 8. So four 2-bit codes or two 4-bit codes share a byte, the first
in the lowest bits (as in ONNX's INT2 and INT4), and eight 3-bit codes fill three bytes. The last byte ends with zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_GROUP = 8  # b bytes hold exactly 8 codes of b bits


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes take.

    >>> [packed_size(10, bits) for bits in (2, 3, 4, 8)]
    [3, 4, 5, 10]
    """
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return integer codes as bytes, ``bits`` bits each: uint8 of shape ``(packed_size(codes.numel(), bits),)``.

    Args:
        codes: any integer dtype and shape, read in row-major order; bits above the lowest ``bits`` are cut off.
        bits: 2 to 8.

    >>> pack(torch.tensor([1, -1, 0, -2]), 2).tolist()  # -2 0 -1 1: 10 00 11 01
    [141]
    """
    if bits == 8:
        return codes.reshape(-1).to(torch.uint8)
    flat = codes.reshape(-1).to(torch.int64) & (1 << bits) - 1
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % _GROUP)).view(-1, _GROUP)
    words = (groups << bits * torch.arange(_GROUP, device=codes.device)).sum(1, keepdim=True)
    stream = (words >> 8 * torch.arange(bits, device=codes.device)) & 0xFF
    return stream.to(torch.uint8).view(-1)[: packed_size(flat.numel(), bits)].clone()


def unpack(packed: Tensor, shape: Sequence[int], *, bits: int, signed: bool) -> Tensor:
    """Return what ``pack`` was given, as int8 (signed) or uint8: a node of a converted graph with packed weights.

    >>> unpack(torch.tensor([141], dtype=torch.uint8), (2, 2), bits=2, signed=True).tolist()
    [[1, -1], [0, -2]]
    """
    if not 1 <= bits <= 8:  # a file may say anything
        raise ValueError(f"codes of {bits} bits are not packed")
    dtype = torch.int8 if signed else torch.uint8
    shape = torch.Size(shape)
    if bits == 8:
        return packed.view(dtype).reshape(shape)
    stream = torch.nn.functional.pad(packed.to(torch.int64), (0, -packed.numel() % bits)).view(-1, bits)
    words = (stream << 8 * torch.arange(bits, device=packed.device)).sum(1, keepdim=True)
    codes = (words >> bits * torch.arange(_GROUP, device=packed.device)) & (1 << bits) - 1
    if signed:
        half = 1 << bits - 1
        codes = (codes ^ half) - half
    return codes.view(-1)[: shape.numel()].to(dtype).reshape(shape)


def integer_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return round(bias / scale) as int32, saturated: a bias in the units of its layer's accumulators.

    Args:
        bias: shape (channels,).
        scale: scale of the layer's input times that of its weight, shape (channels,) or ().
    """
    limits = torch.iinfo(torch.int32)
    return torch.round(bias.double() / scale.double()).clamp(limits.min, limits.max).to(torch.int32)
