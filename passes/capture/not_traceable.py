"""Why a module can not be followed."""

from pege_fx.passes.capture.constants import WrittenConstantError
from pege_fx.passes.capture.proxies import ContextError, DataDependenceError


class ModeError(Exception):
    """Python asked whether the model trains, to do one thing or another."""


class NotTraceableError(Exception):
    """A module whose ``forward`` can not be followed: which, where, and why."""

    def __init__(self, path: str, place: str, reason: str, cause: Exception | None = None, *, is_block: bool = False) -> None:
        self.said = f"{reason} ({place})" if place else reason
        super().__init__(f"{path}: {self.said}")
        self.path, self.place, self.reason = path, place, reason
        self.is_block = is_block
        self.asks_mode = isinstance(cause, ModeError)
        self.asks_data = type(cause) is DataDependenceError
        self.writes_constant = isinstance(cause, WrittenConstantError)
        self.keeps_meaning = isinstance(cause, (ModeError, ContextError))  # by staying Python, and nothing could be decided
