"""Files in object stores, s3://, gs:// and abfss:// URIs, by pyarrow (the extra [ray])."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from ..extras import need

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_uri(text: object) -> bool:
    """Whether that is a URI, not a path."""
    return isinstance(text, str) and _URI.match(text) is not None


def below(uri: str) -> list[tuple[str, tuple[str, ...]]]:
    """The files below a URI, sorted: each one's URI, and the names that lead to it; of a file, itself and no names.

    Raises:
        ValueError: there is nothing, or no such store.
    """
    system, path = _opened(uri)
    from pyarrow.fs import FileSelector, FileType

    try:
        kind = system.get_file_info(path).type
        if kind == FileType.File:
            return [(uri, ())]
        if kind == FileType.NotFound:
            raise ValueError(f"{uri}: does not exist")
        found = system.get_file_info(FileSelector(path, recursive=True))
    except OSError as error:
        raise ValueError(f"{uri}: cannot be searched: {error}") from error
    names = (info.path[len(path.rstrip("/")) :] for info in found if info.type == FileType.File)
    return [(joined(uri, name), tuple(name.split("/"))) for name in sorted(n[1:] for n in names)]


def read(uri: str) -> bytes:
    """The content of a file.

    Raises:
        ValueError: it cannot be read.
    """
    system, path = _opened(uri)
    try:
        with system.open_input_stream(path) as file:
            content: bytes = file.read()
    except OSError as error:
        raise ValueError(f"{uri}: cannot be read: {error}") from error
    return content


def write(uri: str, content: bytes | memoryview) -> None:
    """Writes a file, which is there when it is whole, as object stores have it.

    Raises:
        ValueError: it cannot be written.
    """
    system, path = _opened(uri)
    try:
        with system.open_output_stream(path) as file:
            file.write(content)
    except OSError as error:
        raise ValueError(f"{uri}: cannot be written: {error}") from error


def delete(uri: str) -> None:
    """Removes a file, where it is there and may be removed."""
    system, path = _opened(uri)
    with suppress(OSError):
        system.delete_file(path)


def joined(folder: str, name: str) -> str:
    """The URI of the file ``name``, as it is called, below a folder's, before the options that may follow a "?"."""
    start, _, query = folder.partition("?")
    return f"{start.rstrip('/')}/{quote(name)}{'?' if query else ''}{query}"


def _opened(uri: str) -> tuple[Any, str]:
    need("a URI", "ray", "pyarrow")
    import pyarrow
    import pyarrow.fs

    try:
        system, path = pyarrow.fs.FileSystem.from_uri(uri)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{uri}: no store that can be read: {error}") from error
    return system, path
