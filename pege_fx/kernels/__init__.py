"""Kernels for eager mode, one file per way to make them: C, Triton, inductor; and the tensors' layouts that they serve."""

from pege_fx.kernels.inductor import eager_kernels

__all__ = ["eager_kernels"]
