"""Which pictures and videos the arguments of a command come to, and what their results are called."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .pictures import ENDINGS, PICTURE_SUFFIXES, VIDEO_SUFFIXES, is_video, no_file, no_picture


class Job(NamedTuple):
    """A picture or video to work on."""

    path: Path
    name: Path  #: of its results, below the folder for them and without their endings
    video: bool = False


class Found(NamedTuple):
    """What arguments came to, each in the arguments' order, folders sorted."""

    jobs: list[Job]
    problems: list[str]  #: what is no picture though it looks like one
    repeats: list[str]  #: what leads to pictures that are there already
    repeated: int  #: how many pictures those are


def find(arguments: Sequence[str]) -> Found:
    """The pictures and videos that ``arguments``, files and folders, come to, each once, and what is wrong with the rest.

    Folders are searched with their subfolders and those that links lead to. A picture that is reached in several
    ways is taken where no link leads to it, else where it is met first.
    """
    search = _Search(arguments)
    chosen: dict[str, _Picture] = {}
    for picture in sorted(search.pictures, key=lambda picture: (picture.linked, picture.place)):
        chosen.setdefault(picture.real, picture)
    repeats = []
    for picture in search.pictures:
        if (first := chosen[picture.real]) is not picture:
            what = "is a link to" if picture.linked else "is the same as"
            said = f"{picture.path}: {what} {first.path}, which is there already"
            repeats.append((picture.place, said, 1))
    for place, path, real in search.repeated_folders:
        count = sum(Path(picture).is_relative_to(real) for picture in chosen)
        repeats.append((place, f"{path}: is a link to {real}, which is searched already", count))
    taken = sorted(chosen.values(), key=lambda picture: picture.place)
    return Found(
        [Job(one.path, name, one.video) for one, name in zip(taken, _names_of(taken))],
        [said for _, said in sorted(search.problems)],
        [said for _, said, _ in sorted(repeats)],
        sum(count for *_, count in repeats),
    )


#: Where something was met: the argument's index, and the names below it.
_Place = tuple[int, tuple[str, ...]]


class _Picture(NamedTuple):
    path: Path
    place: _Place
    linked: bool  #: whether it is a link or behind one, as seen from the argument
    real: str  #: where it lies
    video: bool


class _Search:
    """What there is at and below the arguments; folders that links lead to come last, and only if they are new."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.pictures: list[_Picture] = []
        self.problems: list[tuple[_Place, str]] = []
        self.repeated_folders: list[tuple[_Place, Path, str]] = []
        self._searched: set[str] = set()
        self._links: deque[tuple[_Place, Path]] = deque()
        folders = []
        for index, argument in enumerate(arguments):
            path = Path(argument)
            place: _Place = (index, ())
            if os.path.isdir(argument):
                folders.append((place, path))
                self._folder(path, place, linked=False)
            elif (why_not := no_file(argument)) is not None:
                self.problems.append((place, f"{argument}: {why_not}"))
            else:
                self._picture(path, place, path.is_symlink())
        while self._links:
            place, path = self._links.popleft()
            real = os.path.realpath(path)
            if Path(os.path.realpath(path.parent)).is_relative_to(real):
                self.problems.append((place, f"{path}: is a link in a circle, to {real}"))
            elif real in self._searched:
                self.repeated_folders.append((place, path, real))
            else:
                self._folder(path, place, linked=True)
        said = {place[0] for place, _ in self.problems}
        said |= {place[0] for place, *_ in self.repeated_folders}
        said |= {picture.place[0] for picture in self.pictures}
        self.problems += [
            (place, f"{path}: no pictures in this folder")
            for place, path in folders
            if place[0] not in said
        ]

    def _folder(self, folder: Path, above: _Place, linked: bool) -> None:
        self._searched.add(os.path.realpath(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            self.problems.append((above, f"{folder}: cannot be searched: {error.strerror}"))
            return
        for entry in entries:
            path, place = folder / entry.name, (above[0], (*above[1], entry.name))
            if entry.is_dir(follow_symlinks=False):
                self._folder(path, place, linked)
            elif entry.name.startswith(".") or entry.name.endswith(ENDINGS):
                continue
            elif os.path.isdir(path):
                self._links.append((place, path))
            elif (why_not := _why_not(path)) is not None:
                self.problems.append((place, f"{path}: {why_not}"))
            elif path.suffix.lower() in (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES):
                self._picture(path, place, linked or entry.is_symlink())

    def _picture(self, path: Path, place: _Place, linked: bool) -> None:
        real = os.path.realpath(path)
        self.pictures.append(_Picture(path, place, linked, real, is_video(path)))


def _why_not(path: Path) -> str | None:
    """Why something in a folder is no picture, where it may be meant as one."""
    why_not = no_file(str(path))
    if why_not is None:
        return None if path.suffix.lower() in VIDEO_SUFFIXES else no_picture(path.name)
    gone = not os.path.lexists(
        os.path.realpath(path)
    )  # of a link that leads nowhere, not in a circle
    return (
        None
        if gone and path.suffix.lower() not in ("", *PICTURE_SUFFIXES, *VIDEO_SUFFIXES)
        else why_not
    )


def _names_of(pictures: Sequence[_Picture]) -> list[Path]:
    parts = [Path(os.path.abspath(picture.path)).parts[1:] for picture in pictures]
    return result_names(parts, [len(picture.place[1]) for picture in pictures])


def result_names(parts: Sequence[tuple[str, ...]], below: Sequence[int]) -> list[Path]:
    """Names for the results of pictures: as they lie below their arguments, with as many more folders as tell
    equal names in two folders apart, and the ending added to the second of equal names in one.

    Args:
        parts: of each picture's whole path.
        below: how many of them lie below its argument; 0 where the picture is the argument.
    """
    plain = [(*above, Path(name).stem) for *above, name in parts]
    depths = [max(1, count) for count in below]
    deeper: list[int] | None = None
    while deeper is None or deeper:
        alike = defaultdict(list)
        for index, (stems, depth) in enumerate(zip(plain, depths)):
            alike["/".join(stems[-depth:]).casefold()].append(index)
        deeper = [
            index
            for group in alike.values()
            if len({plain[index][:-1] for index in group}) > 1
            for index in group
            if depths[index] < len(plain[index])
        ]
        for index in deeper:
            depths[index] += 1
    names: list[Path] = []
    taken: set[str] = set()
    for (*_, full), stems, depth in zip(parts, plain, depths):
        free = (n for n in _endings(Path(*stems[-depth:]), full) if str(n).casefold() not in taken)
        names.append(next(free))
        taken.add(str(names[-1]).casefold())
    return names


def _endings(plain: Path, full: str) -> Iterator[Path]:
    """Names for the results of the picture called ``full``, the plainest first."""
    yield plain
    longer = f"{plain.name}_{Path(full).suffix[1:]}"
    yield plain.with_name(longer)
    number = 2
    while True:
        yield plain.with_name(f"{longer}_{number}")
        number += 1
