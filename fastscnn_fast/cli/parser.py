"""A parser that says of a word that it does not know which it may be meant for."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any


def like(word: str, known: Iterable[Any]) -> str:
    """ ", did you mean ...?" with the one of ``known`` that is most like ``word``; nothing where none is."""
    word, names = word.lower(), list(map(str, known))
    found = difflib.get_close_matches(word, names, 1, 0.7)
    if len(word) > 1:
        found += [name for name in names if name.startswith(word) or word.startswith(name)]
    return f", did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """Its mistakes have suggestions; those of options come before what is missing."""

    def check_options(self, words: Sequence[str]) -> None:
        """Ends the program, as :meth:`error` does, at the first option that this parser does not have.

        ``-out`` is none where there is ``--out``: it would be ``-o ut``.
        """
        known = self._option_string_actions
        for word in takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if not re.match("--?[A-Za-z]", name) or " " in name:  # a number or a value
                continue
            if name.startswith("--"):
                exists = any(option.startswith(name) for option in known)  # or starts as one does
            else:
                exists = name[:2] in known and f"-{name}" not in known
            if not exists:
                long = [option[2:] for option in known if option.startswith("--")]
                meant = like(name.lstrip("-"), long).replace("mean ", "mean --")
                self.error(f"unrecognized option {name}{meant}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += like(str(value), action.choices or ())
            raise
