"""Number formats and whole policies in short: the names that the field uses."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Final

from pege_fx.errors import SpecError
from pege_fx.numerics.formats import is_known
from pege_fx.numerics.layouts import layout_named
from pege_fx.numerics.spec import QuantSpec

# What a name stands for; "-g32", "-channel" and the like behind it set the layout.
_NAMES: Final[dict[str, dict[str, Any]]] = {
    "fp8": {"format": "e4m3", "method": "dynamic"},
    "mxfp8": {"format": "e4m3", "method": "mx"},
    "mxfp6": {"format": "e2m3", "method": "mx"},
    "mxfp4": {"format": "e2m1", "method": "mx"},
    "nvfp4": {"format": "e2m1", "method": "nvfp4"},
    "nf4": {"format": "nf4", "method": "dynamic", "granularity": "group-64"},
    "ternary": {"format": "ternary", "method": "absmean"},
    "binary": {"format": "binary", "method": "absmean"},
    "seq2": {"format": "seq2"},
}
EXAMPLES: Final = ("int4-g32", "int8-token", "4-g32", *_NAMES)
POLICIES: Final = ("8da4w-g32", "w4a16", "int4-g32", *_NAMES)

_WITH_LAYOUT = re.compile(
    r"(?P<name>.{1,8192}?)-(?P<layout>(?:g|group-)\d{1,6}(?:-pad)?|(?:b|block-)\d{1,6}x\d{1,6}|token|channel|tensor)"
)
_WHOLE = re.compile(r"(?P<sign>u?)int(?P<bits>[1-8])")
_BITS = re.compile(r"\d{1,4}")


def spec_named(text: str) -> QuantSpec | None:
    """Return the spec that a name stands for, or None.

    Args:
        text: bits ("4": learned scales), a name of ``EXAMPLES``, or that of a number format; with a layout behind it:
            "4-g32" learns a scale for each group; "int4-g32" takes it from the largest element of the group, as torchao does,
            and "int8-token" from the range of each token; "uint4-g128" has zero points, too.

    >>> spec_named("int4-g32").method, spec_named("4-g32").method
    ('dynamic', 'lsq')
    """
    text = text.strip().lower()
    found = _WITH_LAYOUT.fullmatch(text)
    name, layout = (text, None) if found is None else (found["name"], layout_named(found["layout"]).name)
    fields = _fields(name, layout)
    if fields is None:
        return None
    return QuantSpec(**fields | ({} if layout is None else {"granularity": layout}))


def _fields(name: str, layout: str | None) -> dict[str, Any] | None:
    if _BITS.fullmatch(name):
        return {"bits": int(name)}
    if (whole := _WHOLE.fullmatch(name)) is not None:
        fields: dict[str, Any] = {"bits": int(whole["bits"]), "signed": not whole["sign"]}
        if layout == "token" or (layout is not None and whole["sign"] and layout.startswith("group")):
            return fields | {"method": "dynamic-asymmetric"}
        return fields | ({"method": "dynamic"} if layout is not None and layout.startswith(("group", "block")) else {})
    if name in _NAMES:
        return _NAMES[name]
    return {"format": name, "method": "dynamic"} if is_known(name) else None


def name_of(spec: QuantSpec) -> str | None:
    """Return the shortest name that stands for a spec, or None.

    >>> name_of(QuantSpec(bits=4)), name_of(QuantSpec(bits=4, granularity="group-32"))
    ('4', '4-g32')
    """
    layout = "" if spec.granularity is None else f"-{spec.granularity}".replace("-group-", "-g").replace("-block-", "-b")
    sign = "" if spec.signed is not False else "u"
    bases = (str(spec.bits), f"{sign}int{spec.bits}", *_NAMES, *([] if spec.format is None else [str(spec.format)]))
    for base in bases:
        for name in (base, base + layout):
            try:
                if spec_named(name) == spec:
                    return name
            except SpecError:
                continue
    return None


@dataclass(frozen=True)
class Named:
    """What a policy's name stands for.

    Attributes:
        edges: the spec of each edge that it sets, None for float.
        function: the operations that it is about, None for all.
        ends: the spec of the first and the last operation, None where they are as the others.
    """

    edges: dict[str, QuantSpec | None]
    function: str | None = None
    ends: QuantSpec | None = None


_BITS_OF_BOTH = re.compile(r"(?:W(?P<weight>\d{1,4}))?(?:A(?P<input>\d{1,4}))?", re.IGNORECASE)
_DYNAMIC_LINEAR = re.compile(r"(?P<input>\d)da(?P<weight>\d)w(?:-g(?P<group>\d{1,6}))?", re.IGNORECASE)
_WEIGHTS_OF_LINEAR = re.compile(r"w(?P<weight>\d)a16(?:-g(?P<group>\d{1,6}))?", re.IGNORECASE)
_BOTH_EDGES = ("fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4")
_ALL_WEIGHTS = ("ternary", "binary", "seq2")


def policy_named(text: Any, **fields: Any) -> Named | None:
    """Return what a policy's name stands for, or None.

    Args:
        text: see ``QuantPolicy.parse``.
        fields: of ``QuantSpec``, for all edges.
    """
    if not isinstance(text, str):
        return None
    text = text.strip()
    if (found := _DYNAMIC_LINEAR.fullmatch(text)) is not None:
        group = found["group"] or 32
        return _named("linear", None, fields, weight=f"int{found['weight']}-g{group}", input=f"int{found['input']}-token")
    if (found := _WEIGHTS_OF_LINEAR.fullmatch(text)) is not None:
        return _named("linear", None, fields, weight=f"int{found['weight']}-g{found['group'] or 128}")
    if (both := _BITS_OF_BOTH.fullmatch(text)) is not None and any(both.groups()):
        bits = {edge: None if value in ("16", "32") else value for edge, value in both.groupdict().items() if value is not None}
        return _named(None, "8", fields, **bits)
    name, _, layout = text.lower().partition("-")
    if name in _BOTH_EDGES:
        return _named("linear", None, fields, weight=text, input=text)
    if name in _ALL_WEIGHTS:
        return _named(None, "8", fields, weight=text)
    if (layout or name in _NAMES) and not _BITS.fullmatch(name) and _is_named(text):
        return _named("linear", None, fields, weight=text)
    return None


def _is_named(text: str) -> bool:
    try:
        return spec_named(text) is not None
    except SpecError:
        return False


def _named(function: str | None, ends: str | None, fields: dict[str, Any], **edges: str | None) -> Named:
    specs = {edge: None if name is None else _with(name, fields) for edge, name in edges.items()}
    return Named(specs, function, None if ends is None else spec_named(ends))


def _with(name: str, fields: dict[str, Any]) -> QuantSpec | None:
    found = spec_named(name)
    return None if found is None else dataclasses.replace(found, **fields)
