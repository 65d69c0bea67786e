"""torch's composite layers (attention, transformer layers, recurrent layers) written out in operations that have edges."""
