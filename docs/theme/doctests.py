"""Docstrings hold doctests as plain ``>>>`` lines, which Markdown takes for quotes, and tables as they look: fence both."""

import re
from typing import Any

from griffe import Extension, Object

DOCTEST = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)
TABLE = re.compile(r"^( *)==+ =+\n(?:.*\n)+?\1==+ =+$", re.MULTILINE)


def fenced(text: str) -> str:
    for pattern, language in ((DOCTEST, "pycon"), (TABLE, "text")):
        text = pattern.sub(rf"\1```{language}\n\g<0>\n\1```", text)
    return text


class Doctests(Extension):
    """Fence each run of lines from ``>>>`` to the next empty line, and each table."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
