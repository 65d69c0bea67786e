"""Arithmetic on tensors: number formats, fake quantization, estimators, masks, packing. No file here sees a graph."""
