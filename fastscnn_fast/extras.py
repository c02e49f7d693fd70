"""Packages that only some uses need, which the extras of pyproject.toml install."""

from __future__ import annotations

from importlib.util import find_spec


def need(what: str, extra: str, *packages: str) -> None:
    """Says, before a package is imported for ``what``, that it is missing, and how to get it.

    Raises:
        ImportError: one of ``packages`` is not installed; the message names it and the extra.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise ImportError(f"{what} needs {names}: pip install 'fastscnn_fast[{extra}]'")
