"""Docstrings are written as Sphinx has them: roles, ``:class:`Config```, and comments ``#:`` above a constant.

In the built pages roles are links, which ``make docs`` checks strictly, and such comments are docstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(attr|class|data|func|meth|mod):`([\w.]+)`")


class SphinxHabits(griffe.Extension):
    """Rewrites every docstring of the package as it is read."""

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is not None or attr.lineno is None or attr.is_alias:
            return
        comment: list[str] = []
        for line in reversed(attr.lines_collection[attr.filepath][: attr.lineno - 1]):
            if not line.strip().startswith("#:"):
                break
            comment.insert(0, line.strip()[2:].strip())
        if comment:
            attr.docstring = griffe.Docstring("\n".join(comment), parent=attr)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        _link(pkg)  # once every name is known


def _link(obj: griffe.Object) -> None:
    """Makes links of the roles in the docstrings of ``obj`` and what it holds."""
    if obj.docstring is not None:
        obj.docstring.value = _ROLE.sub(lambda m: _reference(obj, *m.groups()), obj.docstring.value)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            _link(member)


def _reference(obj: griffe.Object, role: str, name: str) -> str:
    if role == "attr":  # stands in its class's own docstring
        return f"`{name}`"
    if name.startswith("."):
        package = obj.module if obj.module.is_init_module else obj.module.parent
        assert package is not None
        path = package.path + name
    else:
        first, _, rest = name.partition(".")
        try:
            path = ".".join(filter(None, [obj.resolve(first), rest]))
        except griffe.NameResolutionError:
            path = name
    return f"[`{name.lstrip('.')}`][{path}]"
