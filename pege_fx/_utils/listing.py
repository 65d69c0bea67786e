"""A table for people: in colour in a terminal, as HTML in a notebook, as plain text in a pipe, and as data."""

import html
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pege_fx._utils.files import atomic_write, path_of
from pege_fx.errors import OutputError

Row = tuple[str, ...]

_GAP, _INDENT = 2, 2
_STYLES = {"float": "yellow", "2": "bright_green", "3": "green", "4": "cyan", "8": "blue"}


@dataclass(frozen=True)
class Listing:
    """A table.

    Attributes:
        title: above it.
        columns: their names.
        rows: cells, one row after another.
        notes: lines below it.
        headings: a line of cells to print before the row of that number: what a group of rows has in common.

    >>> print(Listing("Fruit", ("name", "count"), (("apple", "12"), ("fig", "3")), notes=("Two kinds.",)))
    Fruit
    name   count
    apple  12
    fig    3
    Two kinds.
    """

    title: str
    columns: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    headings: Mapping[int, Row] = field(default_factory=dict)

    def lines(self) -> Iterator[tuple[Row, bool]]:
        """Yield every line of cells in order, and whether it is a heading."""
        for number, row in enumerate(self.rows):
            if number in self.headings:
                yield self.headings[number], True
            yield row, False

    @property
    def widths(self) -> list[int]:
        """Characters that each column takes."""
        return [max(map(len, column)) for column in zip(self.columns, *(row for row, _ in self.lines()), strict=True)]

    def fits(self, width: int) -> bool:
        """Whether every row has room on one line."""
        return sum(self.widths) + _GAP * (len(self.columns) - 1) <= width

    def narrow(self, width: int) -> Iterator[Text]:
        """Yield the lines for a terminal of that width: no cell is broken, columns without room stand below the others."""
        bands = list(_bands(self.widths, width))
        yield from _wrapped(self.title, width)
        for row, is_heading in [(self.columns, True), *self.lines()]:
            for band in bands:
                line = Text("" if band.start == 0 else " " * _INDENT, style="bold" * is_heading)
                for column in band:
                    line.append(
                        row[column].ljust(self.widths[column] + _GAP), "" if is_heading else _STYLES.get(row[column], "")
                    )
                line.rstrip()
                if line.plain:
                    yield from _wrapped(line, width)
        for note in self.notes:
            yield from _wrapped(note, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.fits(options.max_width):
            yield from self.narrow(options.max_width)
            return
        table = Table(title=Text(self.title), title_justify="left", box=None, pad_edge=False)
        for column in self.columns:
            table.add_column(Text(column), overflow="fold", no_wrap=column == self.columns[0])
        for row, is_heading in self.lines():
            table.add_row(*(Text(cell, "" if is_heading else _STYLES.get(cell, "")) for cell in row), style="bold" * is_heading)
        yield table
        yield from map(Text, self.notes)

    def __str__(self) -> str:
        width = shutil.get_terminal_size().columns
        if sys.stdout.isatty() and not self.fits(width):
            return "\n".join(line.plain for line in self.narrow(width))
        return self.to_text()

    def to_text(self) -> str:
        """Return the table with one line for each row, however long."""
        cells, widths = [self.columns, *(row for row, _ in self.lines())], self.widths
        body = [(" " * _GAP).join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([self.title, *body, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return title, rows as dicts by column, and notes."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}

    def to_markdown(self) -> str:
        """Return a Markdown table under a heading."""

        def line(row: Row, bold: bool = False) -> str:
            cells = [cell.replace("|", "\\|").replace("*", "\\*") for cell in row]
            return "| " + " | ".join(f"**{cell}**" if bold and cell else cell for cell in cells) + " |"

        rule = tuple("---" for _ in self.columns)
        table = [line(self.columns), line(rule), *(line(row, is_heading) for row, is_heading in self.lines())]
        return "\n".join([f"### {self.title}", "", *table, "", *(f"- {note}" for note in self.notes)])

    def to_html(self) -> str:
        """Return an HTML table."""

        def line(row: Row, tag: str) -> str:
            sides = ["right" if cell.replace(",", "").isdecimal() else "left" for cell in row]
            cells = zip(sides, map(html.escape, row), strict=True)
            return "<tr>" + "".join(f'<{tag} style="text-align: {side}">{cell}</{tag}>' for side, cell in cells) + "</tr>"

        body = "\n".join(line(row, "th" if is_heading else "td") for row, is_heading in self.lines())
        notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in self.notes)
        head = f"<caption>{html.escape(self.title)}</caption>\n<thead>{line(self.columns, 'th')}</thead>"
        return f"<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>\n{notes}"

    _repr_html_ = to_html


def _bands(widths: Sequence[int], width: int) -> Iterator[range]:
    """Yield the columns that stand side by side: as many as fit, from the second band on indented."""
    start, used = 0, -_GAP
    for column, own in enumerate(widths):
        if used + _GAP + own > width and column > start:
            yield range(start, column)
            start, used = column, _INDENT - _GAP
        used += _GAP + own
    yield range(start, len(widths))


def _wrapped(line: str | Text, width: int) -> Iterator[Text]:
    """Break a line between words; the rest is indented. A word that is longer than the line is left to the terminal."""
    text = Text(line) if isinstance(line, str) else line
    if len(text) <= width:
        yield text
        return
    indent = len(text.plain) - len(text.plain.lstrip()) + _INDENT
    rows = textwrap.wrap(text.plain, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    yield from (Text(row, style=text.style) for row in rows)


def write_listing(listing: Any, path: str | Path) -> None:
    """Write a table, or what prints as one, by the file's ending: .txt, .md, .json or .html.

    Raises:
        OutputError: for another ending, or where nothing can be written.
    """
    writers: dict[str, Callable[[Any], str]] = {
        ".txt": lambda shown: str(getattr(shown, "listing", shown).to_text()),
        ".md": lambda shown: shown.to_markdown(),
        ".json": lambda shown: json.dumps(shown.to_dict(), indent=2),
        ".html": lambda shown: "<!doctype html>\n<meta charset='utf-8'>\n" + shown.to_html(),
    }
    path = path_of(path, OutputError)
    if path.suffix not in writers:
        raise OutputError(f"{path}: the ending {path.suffix!r} says no format; known: {', '.join(writers)}.")
    with atomic_write(path, OutputError) as temporary:
        temporary.write_text(writers[path.suffix](listing) + "\n", encoding="utf-8")
