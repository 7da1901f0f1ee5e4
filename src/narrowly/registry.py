"""Plug-ins by name: one file in the right package, or an entry point of anyone's distribution."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from narrowly.errors import NarrowlyError

T = TypeVar("T")


def unknown(kind: str, name: str, known: list[str]) -> NarrowlyError:
    """The error for a name nobody knows, with the nearest known one."""
    near = get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return NarrowlyError(f"unknown {kind} {name!r}. {hint}Known: {', '.join(known) or 'none'}.")


class Registry(Generic[T]):
    """Names of one kind of plug-in (defense, finder, eval, ...).

    Args:
        kind: the word for one plug-in, used in errors; entry points live in `narrowly.<kind>s`.
        package: dotted name of the package whose every module is imported at the first look-up,
            so that a new plug-in is one new file.
    """

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self.package = package
        self._known: dict[str, T] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make the class or function known as `name`.

        Raises:
            ValueError: the name is taken by something else.
        """

        def decorate(plugin: T) -> T:
            if self._known.setdefault(name, plugin) is not plugin:
                raise ValueError(f"the {self.kind} {name!r} is registered twice")
            return plugin

        return decorate

    def _complete_once(self) -> None:
        if self._complete:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for entry in entry_points(group=f"narrowly.{self.kind}s"):
            self._known.setdefault(entry.name, entry.load())
        self._complete = True

    def names(self) -> list[str]:
        """Every known name, sorted."""
        self._complete_once()
        return sorted(self._known)

    def __getitem__(self, name: str) -> T:
        self._complete_once()
        if name not in self._known:
            raise unknown(self.kind, name, self.names())
        return self._known[name]

    def name_of(self, plugin: T) -> str:
        """The name that the plug-in is known by; its own, if nobody registered it."""
        self._complete_once()
        names = (name for name, known in self._known.items() if known is plugin)
        return next(names, getattr(plugin, "__name__", str(plugin)).lower())
