"""Triton's interpreter has to be asked for before triton is imported: these tests run in a process of their own.

TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreted [-m "slow or not slow"]
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
