"""Errors and warnings: each message says what went wrong, where, and the fix."""

import difflib
from collections.abc import Iterable


class PegeError(Exception):
    """Base of every error that a user of ``pege_fx`` can cause."""


class SpecError(PegeError, ValueError):
    """A number format, forward method or estimator that does not exist or contradicts itself."""


class PolicyError(PegeError, ValueError):
    """A policy that can not be read, or a rule that decides nothing."""


class ScheduleError(PegeError, ValueError):
    """A curve or a scheduler with values outside their range."""


class TraceError(PegeError):
    """A model that torch.fx can not capture."""


class InputError(PegeError):
    """Example inputs or batches that do not fit the model's ``forward``."""


class ModelError(PegeError):
    """A model in the wrong state: already prepared, not prepared, weights that are not finite."""


class FoldError(PegeError):
    """A BatchNorm option that does not exist, or a fold that is not safe."""


class VerifyError(PegeError):
    """A graph that is not what its plan says, or does not compute what its model does."""


class CheckpointError(PegeError):
    """A saved state that is broken or belongs to another graph."""


class ConvertError(PegeError):
    """A prepared graph that can not be lowered."""


class ExportError(PegeError):
    """A deployed graph that can not be written in the format asked for."""


class OtherCallError(InputError):
    """A graph was called with other fixed arguments than it was traced for."""


class OutputError(PegeError):
    """A file that can not be written: its ending says no format, or the place does not exist or is not writable."""


class LawError(PegeError, AssertionError):
    """A rewrite of a graph that breaks a law which it should keep."""


class PackageError(PegeError, ImportError):
    """A package that is not installed, and that an optional part needs."""


class NonFiniteError(PegeError, ArithmeticError):
    """NaN or infinity in the loss or a gradient."""


class PegeWarning(UserWarning):
    """Something that works, but probably not as the user expects."""


def closest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return the candidates that look most like ``name``, comma separated.

    >>> closest("layr1.conv", ["layer1.conv", "fc"], count=1)
    'layer1.conv'
    """
    return ", ".join(difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.0))
