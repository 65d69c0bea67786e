"""Modules of a prepared graph: fake-quants with their forward methods, folded BatchNorms, the training mode."""
