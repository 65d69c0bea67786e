"""A table for people: in colour in a terminal, as HTML in a notebook, as plain text in a pipe, and as data."""

import html
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pege_fx._utils.files import atomic_write, path_of
from pege_fx.errors import OutputError

Row = tuple[str, ...]

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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=Text(self.title), title_justify="left", box=None, pad_edge=False)
        for column in self.columns:
            table.add_column(Text(column), overflow="fold", no_wrap=column == self.columns[0])
        for row, is_heading in self.lines():
            table.add_row(*(Text(cell, "" if is_heading else _STYLES.get(cell, "")) for cell in row), style="bold" * is_heading)
        yield table
        yield from map(Text, self.notes)

    def __str__(self) -> str:
        cells = [self.columns, *(row for row, _ in self.lines())]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        body = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
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


def write_listing(listing: Any, path: str | Path) -> None:
    """Write a table, or what prints as one, by the file's ending: .txt, .md, .json or .html.

    Raises:
        OutputError: for another ending, or where nothing can be written.
    """
    writers: dict[str, Callable[[Any], str]] = {
        ".txt": str,
        ".md": lambda shown: shown.to_markdown(),
        ".json": lambda shown: json.dumps(shown.to_dict(), indent=2),
        ".html": lambda shown: "<!doctype html>\n<meta charset='utf-8'>\n" + shown.to_html(),
    }
    path = path_of(path, OutputError)
    if path.suffix not in writers:
        raise OutputError(f"{path}: the ending {path.suffix!r} says no format; known: {', '.join(writers)}.")
    with atomic_write(path, OutputError) as temporary:
        temporary.write_text(writers[path.suffix](listing) + "\n", encoding="utf-8")
