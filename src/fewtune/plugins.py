"""Tables of values by name, which an installed package may extend by entry points."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, cast

from fewtune.errors import ConfigError, MissingExtra, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Deferred:
    """A value of fewtune's own that is imported when it is asked for, since its module needs optional libraries.

    Args:
        reference: module and attribute, as an entry point writes them: "fewtune.models.timm:TIMM".
        libraries: what the module imports.
        extra: of fewtune, which installs them.
    """

    reference: str
    libraries: tuple[str, ...] = ()
    extra: str = "train"

    def load(self) -> object:
        """The value; MissingExtra where a library is not installed."""
        for library in self.libraries:
            if importlib.util.find_spec(library) is None:
                raise MissingExtra(library, self.extra)
        return EntryPoint("", self.reference, "").load()


def later(reference: str, **defaults: object) -> Callable[..., Any]:
    """A function of fewtune's own, by module and name ("fewtune.report:write_report"), imported when it is called.

    `defaults` are options that it is given where they are left out or None.
    """

    def call(*args: Any, **options: Any) -> Any:
        options |= {name: value for name, value in defaults.items() if options.get(name) is None}
        return cast("Callable[..., Any]", Deferred(reference).load())(*args, **options)

    return call


class Table(MutableMapping[str, T]):
    """Values by name: fewtune's own first, then those of installed packages, each imported when it is asked for.

    A package offers a value in its pyproject.toml; a script puts it in by hand (``TABLE["name"] = value``)::

        [project.entry-points."fewtune.methods"]
        norms = "mypackage.norms:NORMS"

    Args:
        group: of the entry points.
        kind: what a value is called in messages.
        values: fewtune's own; an entry point cannot replace one.
        deferred: those of fewtune's own whose modules are imported late.
    """

    def __init__(
        self,
        group: str,
        kind: str,
        values: Mapping[str, T] | None = None,
        *,
        deferred: Mapping[str, Deferred] | None = None,
    ) -> None:
        self.kind, self._group = kind, group
        self._values, self._deferred = dict(values or {}), dict(deferred or {})

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            self._values[name] = self._loaded(self._offered()[name])
        return self._values[name]

    def __setitem__(self, name: str, value: T) -> None:
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._deferred, *self._values, *self._offered()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._offered()

    def known(self, name: str) -> str:
        """The name itself. ValueError where there is no such value; the nearest name is told."""
        if name not in self:
            known = ", ".join(map(repr, self))
            raise ValueError(f"there is no {self.kind} '{name}'{nearest(name, self)}; expected one of {known}")
        return name

    @property
    def present(self) -> dict[str, T]:
        """The values that are here without importing any package: fewtune's own, and what was asked for before."""
        return dict(self._values)

    def _offered(self) -> dict[str, EntryPoint | Deferred]:
        return {**{point.name: point for point in entry_points(group=self._group)}, **self._deferred}

    def _loaded(self, point: EntryPoint | Deferred) -> T:
        if isinstance(point, Deferred):
            return cast("T", point.load())
        try:
            value: T = point.load()
        except Exception as error:
            raise ConfigError(
                f"{self.kind} '{point.name}' of {point.value} cannot be imported ({type(error).__name__}: {error}); "
                "update or remove the package that offers it"
            ) from error
        return value
