"""Files that are whole or not there, and the folders that they go to."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path

#: Errors that are those of one file alone, unlike a full disk.
OF_ONE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)

_PART = ".fastscnn-{}.part"
_CLAIMED: ContextVar[frozenset[Path]] = ContextVar("_CLAIMED", default=frozenset())


def check_path(path: object) -> None:
    """Refuses what names no file, before it is opened or written.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty, which would be the current folder.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        got = repr(path) if path is None or isinstance(path, bytes) else type(path).__name__
        raise TypeError(f"path must be a str or os.PathLike, got {got}")
    if path == "":
        raise ValueError("path must name a file, got ''")


def write_whole(
    path: str | os.PathLike[str], content: bytes | memoryview, durable: bool = True
) -> None:
    """Writes a file that is all there at once: whoever looks sees what was there before, or all of ``content``.

    It gets the mode that the umask says. What is no regular file (a device, a pipe) is written to as it is.
    ``durable`` waits until the disk has it, so that a power cut cannot undo it either; milliseconds a file.

    Raises:
        OSError: it cannot be written, and why, by the name of ``path``; what was there before still is.
    """
    named = os.fspath(path)
    try:
        if os.path.exists(named) and not os.path.isfile(named):
            Path(named).write_bytes(content)
        else:
            _replace(Path(named), content, durable)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), named) from error


def _replace(path: Path, content: bytes | memoryview, durable: bool) -> None:
    with whole(path) as part, part.open("wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The path of an empty file beside ``path``; it becomes ``path`` at the end, or, after an error, is removed.

    Where ``path`` is a link it stays one, and what it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    part = path.with_name(_PART.format(secrets.token_hex(8)))
    try:
        part.touch(exist_ok=False)
        with _locked(part, part):  # which tells claims that it is in use
            yield part
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def folder(path: Path) -> Iterator[None]:
    """Makes a folder that files can be written to; of what it made, nothing that is still empty stays.

    Raises:
        OSError: it cannot be made or written to, and why, by name.
    """
    made = _make(path)
    try:
        yield
    finally:
        _unmake(made)


@contextmanager
def folder_of(file: Path) -> Iterator[None]:
    """:func:`folder` that a file is to be written to whole; nothing where that is a device or a pipe.

    Raises:
        OSError: as :func:`folder`, or the file is a folder.
    """
    if file.is_dir():
        raise _error(errno.EISDIR, file)
    with nullcontext() if file.exists() and not file.is_file() else folder(file.parent):
        yield


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """:func:`folder`, for this run alone, until the end: what was left half-written in it is removed.

    A claim holds between processes and threads; within one it can be repeated. Where the file system has no
    locks there is none. What others, as a command that was told to write there, are writing is left to them.

    Raises:
        ValueError: another run has claimed it.
        OSError: as :func:`folder`.
    """
    made = _make(path)
    real = path.resolve()
    if real in _CLAIMED.get():
        yield
        return
    with _locked(real, path) as alone:
        token = _CLAIMED.set(_CLAIMED.get() | {real})
        try:
            for part in real.glob(_PART.format("*")) if alone else ():
                with suppress(ValueError, OSError):  # in use, or renamed or gone by now
                    if part.stat().st_size == 0:  # it may be about to be locked
                        continue
                    with _locked(part, part) as free:  # False: there are locks of folders alone
                        if free:
                            part.unlink()
            yield
        finally:
            _CLAIMED.reset(token)
            _unmake(
                made
            )  # only now: a run that was refused leaves the folder to the one that has it


def _make(path: Path) -> list[Path]:
    """Makes a folder and its parents; those that were not there, the innermost first."""
    made: list[Path] = []
    try:
        for each in reversed((path, *path.parents)):
            try:
                if not each.is_dir():
                    each.mkdir()
                    made.insert(0, each)
            except FileExistsError:
                if not each.is_dir():  # else another run was faster
                    raise _error(errno.ENOTDIR, each) from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise _error(errno.EACCES, path)
    except OSError:
        _unmake(made)
        raise
    return made


def _unmake(made: list[Path]) -> None:
    with suppress(OSError):  # the first that is not empty ends it
        for each in made:
            each.rmdir()


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


@contextmanager
def _locked(real: Path, path: Path) -> Iterator[bool]:
    """Locks a folder or file itself: none is left over, and the process's death ends it; False: there is no way."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    handle = os.open(real, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another run is writing to this folder") from None
        except OSError:  # some network file systems have no locks
            yield False
        else:
            yield True
    finally:
        os.close(handle)
