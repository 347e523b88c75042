"""Which parameters are left out, told by patterns of their names or of the modules that hold them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from fewtune.errors import SelectionError, nearest
from fewtune.neurons.anatomy import Anatomy
from fewtune.neurons.roles import Role


def excluded(anatomy: Anatomy, patterns: Iterable[str]) -> set[str]:
    """Names of the parameters that a pattern matches, by their own name or that of a module around them; the head's
    aside.

    Raises:
        SelectionError: a pattern matches nothing.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    names = {name: _names(name) for name in anatomy.shapes if anatomy.roles.get(name) is not Role.HEAD}
    left_out: set[str] = set()
    for pattern in patterns:
        hit = {name for name, inside in names.items() if fnmatch.filter(inside, pattern)}
        if not hit:
            known = {module for inside in names.values() for module in inside}
            raise SelectionError(f"exclude: no module matches {pattern!r}{nearest(pattern, known)}")
        left_out |= hit
    return left_out


def _names(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
