"""Registry: name -> item, filled from the files of one package.

Adding a thing means adding one file. The files are imported on first use, so that importing a registry stays cheap.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from .errors import RecipeError

T = TypeVar("T")


class Registry(Generic[T]):
    """Items of one kind by name, in order of registration.

    Args:
        kind: What an item is called in messages, e.g. ``"calibration method"``.
        package: Import name of the package whose modules register the items.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._items: dict[str, T] = {}
        self._loaded = False

    def add(self, name: str, item: T) -> T:
        """Register ``item`` under ``name`` and return it.

        Raises:
            ValueError: ``name`` is taken.
        """
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under ``name``."""
        return lambda item: self.add(name, item)

    def get(self, name: str) -> T:
        """Return the item called ``name``.

        Raises:
            RecipeError: No such item; the message suggests near names.
        """
        self._load()
        if name not in self._items:
            near = difflib.get_close_matches(name, self._items, n=3, cutoff=0.5) or sorted(self._items)
            raise RecipeError(
                f"no {self.kind} is called {name!r}",
                found=repr(name),
                expected=", ".join(near),
                do=f"use one of: {', '.join(sorted(self._items))}",
            )
        return self._items[name]

    def resolve(self, text: str) -> T:
        """Return the item that ``text`` names, with its first option set if ``text`` says so.

        Args:
            text: A registered name, or ``name:number`` for an item that is a dataclass with options as fields.

        Raises:
            RecipeError: No such item, an item without options, or a value that the option does not take.
        """
        name, colon, value = text.partition(":")
        item: Any = self.get(name.strip())
        if not colon:
            return item  # type: ignore[no-any-return]
        options = [field.name for field in dataclasses.fields(item)] if dataclasses.is_dataclass(item) else []
        if not options:
            raise RecipeError(f"the {self.kind} {name!r} has no options", found=repr(text), do=f"use {name!r}")
        try:
            return dataclasses.replace(item, **{options[0]: float(value)})  # type: ignore[no-any-return]
        except ValueError as error:
            raise RecipeError(
                f"the {self.kind} {name!r} does not take {value!r}",
                found=repr(text),
                expected=f"{options[0]}: {error}",
                do=f"leave it out: {name!r}",
            ) from error

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._load()
        return sorted(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield ``(name, item)``, sorted by name."""
        self._load()
        yield from sorted(self._items.items())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
