"""Forward methods and estimators by name, the library's own and a user's."""

from typing import Any

from pege_fx.errors import SpecError, closest


class Registry:
    """Classes by name: forward methods and estimators, the library's own and a user's."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._classes: dict[str, type[Any]] = {}

    def add(self, name: str, cls: type[Any]) -> None:
        known = self._classes.get(name)
        # A notebook cell run twice defines the same class again; that is not a conflict.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(f"{self.what} {name!r} is already {known.__module__}.{known.__qualname__}: choose another name.")
        self._classes[name] = cls

    def name_of(self, choice: str | type[Any]) -> str:
        """Return the registered name of a class or of a name; raise ``SpecError`` for anything else."""
        for name, cls in self._classes.items():
            if choice == name or choice is cls:
                return name
        shown = choice if isinstance(choice, str) else getattr(choice, "__name__", repr(choice))
        raise SpecError(
            f"unknown {self.what} {shown!r}.\n"
            f"  known: {', '.join(sorted(self._classes))}\n"
            f"  closest: {closest(str(shown), self._classes, 1)}; or write a class, see docs/extending.md."
        )

    def __getitem__(self, name: str) -> type[Any]:
        return self._classes[name]

    def __iter__(self) -> Any:
        return iter(self._classes)


METHODS = Registry("forward method")
ESTIMATORS = Registry("estimator")
