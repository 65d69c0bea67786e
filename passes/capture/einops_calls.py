"""einops while a module is traced."""

import re
import string
import sys
from typing import Any


def letters(pattern: str) -> str:
    """The pattern of ``einops.einsum`` as torch's: "batch i, i o -> batch o" is "ab,bc->ac"."""
    names = dict.fromkeys(re.findall(r"[^\W\d]\w*", pattern))
    letter = dict(zip(names, string.ascii_letters, strict=False))
    return re.sub(r"[^\W\d]\w*", lambda name: letter[name[0]], pattern).replace(" ", "")


def einops_modules() -> tuple[Any, ...]:
    """einops, if the model uses it: its functions take tensors and nothing else, and stay whole in the graph."""
    return (sys.modules["einops"],) if "einops" in sys.modules else ()
