"""Patterns for module paths, from files that anybody may have written: matching takes time in proportion to pattern and path.

Python's ``re`` tries one way after the other, and ``(a+)+b`` has more ways than anybody can wait for. Here a pattern is a
function from a set of positions to the set of positions where it may end: there are no more of them than letters.
"""

import fnmatch
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from pege_fx.errors import PolicyError

LONGEST = 2_000  # characters of a regular expression
MOST_STEPS = 1_000_000  # of a single match: about a second; a path takes some hundred

Positions = frozenset[int]
Step = Callable[["_Match", Positions], Positions]


@dataclass(frozen=True)
class PathPattern:
    """What ``Rule(match=...)`` takes: a glob (``*`` also crosses dots), or ``re:`` and a regular expression.

    A regular expression is what Python's ``re`` takes, without what needs trying one way after the other: references to
    groups, conditions, atomic groups and possessive repetition; and without flags in its middle, and verbose ones.

    Raises:
        PolicyError: for what is no text, or no such expression.

    >>> PathPattern("layer1.*").fullmatch("layer1.0.conv1"), PathPattern(r"re:layer\\d").fullmatch("layer12")
    (True, False)
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise PolicyError(f"match={self.text!r} is not text: give a glob, or 're:' and a regular expression.")
        _matcher(self.text)

    def fullmatch(self, path: str) -> bool:
        """Tell whether the whole path is one that the pattern means."""
        return _fullmatch(self.text, path)


@functools.lru_cache(maxsize=10_000)  # a model's paths are asked about again and again
def _fullmatch(text: str, path: str) -> bool:
    return _matcher(text)(path)


@functools.lru_cache(maxsize=1000)
def _matcher(text: str) -> Callable[[str], bool]:
    if not text.startswith("re:"):
        glob = re.compile(fnmatch.translate(text))  # whose stars give nothing back: there is one way
        return lambda path: glob.fullmatch(path) is not None
    expression = text.removeprefix("re:")
    try:
        re.compile(expression)
        if len(expression) > LONGEST:
            raise ValueError(f"it has more than {LONGEST} characters")
        step = _Parser(expression).parse()
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise PolicyError(f"match={text!r} is not a regular expression: {error}.") from error
    return lambda path: len(path) in step(_Match(text, path), frozenset((0,)))


def _itself(part: "Step") -> "Step":
    return part


class _Match:
    """One match: the path, and how many steps are left."""

    def __init__(self, pattern: str, path: str) -> None:
        self.pattern, self.path, self.left = pattern, path, MOST_STEPS

    def count(self, positions: Positions) -> None:
        self.left -= 1 + len(positions)
        if self.left < 0:
            raise PolicyError(f"match={self.pattern!r} takes too long on a path of {len(self.path)} characters: simplify it.")


# --- what expressions are made of --------------------------------------------------------------------------------


def _one_of(letters: re.Pattern[str]) -> Step:
    def step(match: _Match, starts: Positions) -> Positions:
        match.count(starts)
        return frozenset(i + 1 for i in starts if i < len(match.path) and letters.fullmatch(match.path[i]))

    return step


def _where(place: re.Pattern[str]) -> Step:
    """``^``, ``$``, ``\\b`` and their like, which take no letter."""

    def step(match: _Match, starts: Positions) -> Positions:
        match.count(starts)
        return frozenset(i for i in starts if place.match(match.path, i))

    return step


def _sequence(parts: list[Step]) -> Step:
    def step(match: _Match, starts: Positions) -> Positions:
        for part in parts:
            starts = part(match, starts)
            if not starts:
                break
        return starts

    return step


def _any_of(parts: list[Step]) -> Step:
    return lambda match, starts: frozenset().union(*(part(match, starts) for part in parts))


def _repeated(part: Step, least: int, most: int | None) -> Step:
    """So often until nothing changes: each time takes a letter at least, or gives all that the time before gave."""

    def step(match: _Match, starts: Positions) -> Positions:
        for _ in range(least):
            before, starts = starts, part(match, starts)
            if starts in (before, frozenset()):
                break
        found = new = starts
        times = least
        while new and times != most:
            match.count(new)
            new = part(match, new) - found
            found, times = found | new, times + 1
        return found

    return step


def _ahead(part: Step, wanted: bool) -> Step:
    def step(match: _Match, starts: Positions) -> Positions:
        return frozenset(i for i in starts if bool(part(match, frozenset((i,)))) is wanted)

    return step


def _behind(part: Step, wanted: bool) -> Step:
    def step(match: _Match, starts: Positions) -> Positions:
        return frozenset(i for i in starts if any(i in part(match, frozenset((j,))) for j in range(i + 1)) is wanted)

    return step


# --- reading them ------------------------------------------------------------------------------------------------

_FLAGS = re.compile(r"\(\?([aimsu]+)\)")
_GROUP = re.compile(r"\((?!\?)|\(\?(?::|P<\w+>|=|!|<=|<!)")
_COMMENT = re.compile(r"\(\?#[^)]*\)")
_REPEAT = re.compile(r"(?:([*+?])|\{(?:(\d+)|(\d*),(\d*))\})([?+]?)")
_WHERE = re.compile(r"\\[AZbB]|[$^]")
_LETTER = re.compile(
    r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|N\{[^}]*\}|0[0-7]{0,2}|[0-3][0-7]{2}|[^1-9])"
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\()|*+?\[$^]",
    re.DOTALL,
)
_AROUND: dict[str, Callable[[Step], Step]] = {
    "(?=": lambda part: _ahead(part, True),
    "(?!": lambda part: _ahead(part, False),
    "(?<=": lambda part: _behind(part, True),
    "(?<!": lambda part: _behind(part, False),
}
_REFUSED = "it has a reference to a group, a condition, an atomic group, possessive repetition or a flag: leave it out"


class _Parser:
    """Reads an expression that ``re`` has found to be one."""

    def __init__(self, text: str) -> None:
        found = _FLAGS.match(text)
        self.text, self.at, self.flags = text, found.end() if found else 0, found.group() if found else ""

    def parse(self) -> Step:
        step = self._alternatives()
        if self.at < len(self.text):
            raise ValueError(_REFUSED)
        return step

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found

    def _alternatives(self) -> Step:
        parts = [self._sequence()]
        while self.text[self.at : self.at + 1] == "|":
            self.at += 1
            parts.append(self._sequence())
        return _any_of(parts) if len(parts) > 1 else parts[0]

    def _sequence(self) -> Step:
        parts: list[Step] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if not self._take(_COMMENT):
                parts.append(self._repetition(self._part()))
        return _sequence(parts)

    def _part(self) -> Step:
        if found := self._take(_GROUP):
            inner = self._alternatives()
            self.at += 1
            return _AROUND.get(found.group(), _itself)(inner)
        if found := self._take(_WHERE):
            return _where(re.compile(self.flags + found.group()))
        if found := self._take(_LETTER):
            return _one_of(re.compile(self.flags + found.group()))
        raise ValueError(_REFUSED)

    def _repetition(self, part: Step) -> Step:
        while self._take(_COMMENT):
            pass
        if not (found := self._take(_REPEAT)):
            return part
        sign, exact, least, most, how = found.groups()
        if how == "+":
            raise ValueError(_REFUSED)
        if sign or exact:
            bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign] if sign else (int(exact), int(exact))
        else:
            bounds = (int(least or 0), int(most) if most else None)
        return _repeated(part, *bounds)
