"""A shelf is a package whose modules each offer one thing under one agreed name.

Knows how to list and take modules by file name; knows nothing about what they hold.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from edgekit.errors import UnknownName


def names(package: str) -> list[str]:
    """Sorted module names of `package`; a leading underscore hides a helper module."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def take(package: str, name: str) -> ModuleType:
    """The module `package.name`. Raises UnknownName with the nearest one."""
    known = names(package)
    if name not in known:
        raise unknown(package.rpartition(".")[2], name, known)
    return importlib.import_module(f"{package}.{name}")


def unknown(kind: str, name: str, known: Iterable[str], *, show: str = "") -> UnknownName:
    """The error for a `name` that is not among `known`; `show` is a command that lists them."""
    known = sorted(known)
    folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    parts = [f"did you mean {folded[close[0]]!r}?"] if close else []
    if show:
        parts.append(f"all of them: {show}")
    elif not close:
        parts.append(f"known: {', '.join(known)}")
    return UnknownName(f"no {kind} called {name!r}", "; ".join(parts))
