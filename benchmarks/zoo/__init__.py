"""The models of the coverage table: torchvision, timm, transformers, and models as users write them."""

from benchmarks.zoo import own, timm_models, transformers_models, vision
from benchmarks.zoo.example import Case, Example

__all__ = ["Case", "Example", "cases"]


def cases() -> dict[str, Case]:
    """Return every row by its name."""
    every = [*vision.cases(), *timm_models.cases(), *transformers_models.cases(), *own.cases()]
    return {case.name: case for case in every}
