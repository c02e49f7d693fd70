"""What machine code for NVIDIA's GPUs consists of; nothing here needs a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

#: Instructions of tensor cores, and loads of 16 bytes a thread from global memory, as regular expressions.
PRODUCTS = r"(H|HG|I|IG|Q|QG|UTCH|UTCQ|UTCI)MMA|WARPSYNC_MMA"
WIDE_LOADS = r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128"


def nvidia_program(name: str) -> str | None:
    """The path of one of NVIDIA's programs: from CUDA_HOME, PATH, or the package triton; None where there is none."""
    homes = [os.environ.get(variable, "") for variable in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home, "bin")) for home in homes if home] + [os.environ.get("PATH", "")]
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


@cache
def _cuobjdump() -> str:
    found = nvidia_program("cuobjdump")
    if found is None:
        raise RuntimeError("cuobjdump must be in CUDA_HOME, on PATH or in the package triton")
    return found


def listing(cubin: bytes) -> str:
    """What cuobjdump says of machine code: resource use and instructions.

    Raises:
        RuntimeError: there is no cuobjdump.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sequence(text: str) -> list[str]:
    """The instructions of a listing as they follow each other, with their modifiers."""
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P[0-9T]+\s+)?([A-Z][\w.]*)"
    return re.findall(pattern, text, re.MULTILINE)


def instructions(text: str) -> Counter[str]:
    """How often each instruction, with its modifiers, stands in a listing."""
    return Counter(sequence(text))


def count(found: Mapping[str, int], pattern: str) -> int:
    """Instructions whose name begins with the regular expression ``pattern``."""
    return sum(n for name, n in found.items() if re.match(pattern, name))
