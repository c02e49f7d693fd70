"""Triton's interpreter has to be asked for before triton is imported: these tests run in a process of their own.

test_interpreter.py starts it; by hand: TRITON_INTERPRET=1 python -m pytest -m "interpreted and not slow" tests/gpu
"""

from __future__ import annotations

from targets import INTERPRETED

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
