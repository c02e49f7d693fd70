"""Docstrings are written as Sphinx has them: roles, ``:class:`Config```, and comments ``#:`` above a constant.

In the built pages roles are links, which ``make docs`` checks strictly, and such comments are docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_ROLE = re.compile(r":(attr|class|data|func|meth|mod):`~?([\w.]+)`")


class SphinxHabits(griffe.Extension):
    """Rewrites every docstring of the package once all of its names are known."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    """Rewrites the docstrings of ``obj`` and of what it holds."""
    if obj.is_attribute and obj.docstring is None and (comment := _comment(obj)):
        obj.docstring = griffe.Docstring(comment, parent=obj)
    if obj.docstring is not None:
        obj.docstring.value = _ROLE.sub(lambda m: _link(obj, *m.groups()), obj.docstring.value)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):  # an alias is rewritten where it stands
            _rewrite(member)


def _comment(obj: griffe.Object) -> str:
    """The lines that begin with ``#:`` just above ``obj``."""
    lines: list[str] = []
    if not isinstance(obj.filepath, Path) or obj.lineno is None:
        return ""
    for line in reversed(obj.lines_collection[obj.filepath][: obj.lineno - 1]):
        if not line.strip().startswith("#:"):
            break
        lines.insert(0, line.strip()[2:].strip())
    return "\n".join(lines)


def _link(obj: griffe.Object, role: str, name: str) -> str:
    """A link to what ``name`` is where ``obj`` stands; what it is not found as, ``make docs`` reports."""
    if role == "attr":  # stands in its class's own docstring
        return f"`{name}`"
    if name.startswith("."):
        module = obj.module.path
        path = (module if obj.module.is_init_module else module.rpartition(".")[0]) + name
    else:
        first, _, rest = name.partition(".")
        try:
            path = ".".join(filter(None, [obj.resolve(first), rest]))
        except griffe.NameResolutionError:
            path = name
    return f"[`{name.lstrip('.')}`][{path}]"
