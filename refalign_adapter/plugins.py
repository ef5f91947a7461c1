"""Plug-ins: objects of other packages that these name by entry points, looked for once and loaded when needed.

A plug-in is code that its user has installed. Files know it by its name alone, and a file's name for one that is not
installed is an unknown name.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import UserError, one_line

BESIDE = ("base", "lookup")
"""Modules of such a package that are none of its objects."""


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Attributes:
        name: what the object is known by.
        package: name and version of the distribution that it comes with.
        entry: says where the object is.
    """

    name: str
    package: str
    entry: EntryPoint

    def __str__(self) -> str:
        return f"{self.name!r} of {self.package}"


class Plugins:
    """What there is of one kind: a package's own, a module each, and the plug-ins of an entry-point group.

    Args:
        group: the entry points' group.
        field: what users call such an object; it opens the line of every error.
        package: whose modules, but for "base", "lookup" and private ones, are the built-in ones; a module's name is
            the object's.
        attribute: what a module calls the object.
        problem: says of a name and the object it stands for why that cannot be used, or None.
    """

    def __init__(
        self,
        group: str,
        field: str,
        package: str,
        attribute: str,
        problem: Callable[[str, Any], str | None],
    ):
        self.group, self.field = group, field
        self.package, self.attribute, self._problem = package, attribute, problem
        self._loaded: dict[Plugin, tuple[Any, str | None]] = {}

    def built_in(self) -> list[str]:
        """Names of the package's own, sorted; none is imported."""
        names = [module.name for module in pkgutil.iter_modules(import_module(self.package).__path__)]
        return sorted(name for name in names if name not in BESIDE and not name.startswith("_"))

    def known(self) -> dict[str, Any]:
        """The package's own, imported: name -> object."""
        return {name: getattr(import_module(f"{self.package}.{name}"), self.attribute) for name in self.built_in()}

    @cached_property
    def found(self) -> tuple[Plugin, ...]:
        """All that are installed, by name; none is imported."""
        entries = [(entry, entry.dist) for entry in entry_points(group=self.group)]
        named = [
            Plugin(entry.name, f"{dist.name} {dist.version}" if dist and dist.name else "an unknown package", entry)
            for entry, dist in entries
        ]
        return tuple(sorted(named, key=lambda plugin: (plugin.name, plugin.package)))

    def get(self, name: str) -> Any:
        """The object of this name; None without such a plug-in.

        Raises:
            UserError: it cannot be used, and why.
        """
        named = [plugin for plugin in self.found if plugin.name == name]
        if not named:
            return None
        value, problem = self._load(named[0])
        if problem:
            raise UserError(f"{self.field}: {problem}")
        return value

    def named(self, given: Any, field: str) -> Any:
        """What somebody asks for: by name, by the path `package.module:attribute`, or the object itself.

        Args:
            given: a name, a path or an object; which kind of object that is, is for the caller to check.
            field: what the user called it.

        Raises:
            UserError: no such name or path, or a plug-in that cannot be used.
        """
        if not isinstance(given, str):
            return given
        if ":" in given:
            return load_path(given, field)
        found = self.get(given)  # first: it refuses a name that is a built-in one's too
        if found is None and given in self.built_in():
            found = self.known()[given]
        if found is None:
            names = sorted({*self.built_in(), *(plugin.name for plugin in self.found)})
            raise UserError(f"{field} must be one of {names} or package.module:attribute, got {given!r}")
        return found

    def first(self, fits: Callable[[Any], bool]) -> Any:
        """The first that fits, of the built-in ones, then of the plug-ins that can be used; None where none does."""
        for objects in (self.known, self.usable):
            if (found := next(filter(fits, objects().values()), None)) is not None:
                return found
        return None

    def usable(self) -> dict[str, Any]:
        """Name -> object, of those that can be used."""
        outcomes = {plugin.name: self._load(plugin) for plugin in self.found}
        return {name: value for name, (value, problem) in outcomes.items() if problem is None}

    def problem(self, plugin: Plugin) -> str | None:
        """Why one of `found` cannot be used, in one line; None when it can. Imports it."""
        return self._load(plugin)[1]

    def problems(self) -> list[str]:
        """Of all that cannot be used."""
        return [problem for plugin in self.found if (problem := self.problem(plugin))]

    def _load(self, plugin: Plugin) -> tuple[Any, str | None]:
        if plugin not in self._loaded:
            problem = self._clash(plugin)
            self._loaded[plugin] = (None, problem) if problem else self._import(plugin)
        return self._loaded[plugin]

    def _clash(self, plugin: Plugin) -> str | None:
        """A name that stands for two objects: neither is silently taken for the other."""
        if plugin.name in self.built_in():
            return f"the plug-in {plugin} has a built-in one's name; rename it, or uninstall that package"
        others = [other for other in self.found if other.name == plugin.name and other is not plugin]
        if others:
            return f"the plug-ins {plugin} and {others[0]} have one name; uninstall one of the packages"
        return None

    def _import(self, plugin: Plugin) -> tuple[Any, str | None]:
        try:
            value = plugin.entry.load()
            problem = self._problem(plugin.name, value)
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises
            value, problem = None, f"it cannot be imported: {_reason(error)}"
        if problem is None:
            return value, None
        return None, f"the plug-in {plugin} ({plugin.entry.value}) cannot be used ({problem}); upgrade or uninstall it"


def load_path(path: str, field: str) -> Any:
    """The object at `package.module:attribute`.

    Only for paths that somebody wrote for his own run; none that came with an adapter, a cache or a checkpoint.

    Raises:
        UserError: there is none; opens with `field`.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever that module raises
        raise UserError(f"{field}: cannot load {path!r} as package.module:attribute ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
