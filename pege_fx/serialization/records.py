"""Results by name in a stored graph: they stand for a model's dataclasses and named tuples, whose code stays away."""

import collections
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch.utils._pytree import register_pytree_node


class Record(OrderedDict[str, Any]):
    """A result with named parts, read as ``r["logits"]``, ``r.logits`` or ``r[0]``, as ``transformers``' outputs are.

    >>> r = Record(loss=None, logits=3)
    >>> r.logits, r["logits"], r[1], r.to_tuple()
    (3, 3, 3, (None, 3))
    """

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"there is no part {name!r}: {', '.join(self)}")

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the parts without their names."""
        return tuple(self.values())


register_pytree_node(
    Record,
    lambda value: (list(value.values()), list(value)),
    lambda parts, names: Record(zip(names, parts, strict=True)),
    serialized_type_name="pege_fx.Record",
)


def record(values: Mapping[str, Any], left_out: Sequence[str] = ()) -> Record:
    """Return a result with named parts, as a graph calls it; parts that are left out are None as attributes."""
    made = Record(values)
    vars(made).update(dict.fromkeys(left_out))
    return made


def named_tuple(name: str, fields: Sequence[str], values: Sequence[Any]) -> Any:
    """Return a named tuple of the class that a graph says, as it calls it.

    >>> named_tuple("Box", ["left", "right"], [1, 2])
    Box(left=1, right=2)

    Raises:
        ValueError: for what is no name of a class or of its fields.
    """
    return _named_tuple_class(name, tuple(fields))(*values)


@lru_cache(maxsize=256)
def _named_tuple_class(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def is_named_result(cls: Any) -> bool:
    """Tell whether a class only names the parts of a result: a named tuple or a dataclass, without code that computes.

    Those of ``transformers``, which are dictionaries too, only register their parts when they are made.

    >>> is_named_result(Record), is_named_result(int)
    (False, False)
    """
    if not isinstance(cls, type):
        return False
    if dataclasses.is_dataclass(cls):
        settings = vars(cls).get("__dataclass_params__")  # none: a subclass, whose own __init__ may compute
        return issubclass(cls, dict) or bool(settings and settings.init and not hasattr(cls, "__post_init__"))
    return tuple in cls.__bases__ and hasattr(cls, "_fields")


def as_call(cls: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Return the function and arguments that stand for making a named result of the class.

    >>> from typing import NamedTuple
    >>> class Box(NamedTuple):
    ...     left: int
    ...     right: int = 0
    >>> as_call(Box, (3,), {})[1]
    ('Box', ['left', 'right'], [3, 0])
    """
    if issubclass(cls, tuple):
        given = cls._field_defaults | dict(zip(cls._fields, args, strict=False)) | dict(kwargs)
        return named_tuple, (cls.__name__, list(cls._fields), [given[name] for name in cls._fields])
    defaults = {field.name: _default(field) for field in dataclasses.fields(cls) if field.init}
    given = dict(zip(defaults, args, strict=False)) | dict(kwargs)
    if issubclass(cls, dict):  # those of transformers hold what is not None, and have the others as attributes
        return record, (given, [name for name in defaults if name not in given])
    return record, (defaults | given,)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
