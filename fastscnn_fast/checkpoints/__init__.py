"""Reading and writing weights: our own files and those of every known implementation.

A *layout* is how one code base names the tensors of the network. Which layout a file has is seen from its
keys, which preset and which widths from its shapes. No file can make this package execute code or
allocate more memory than the file's own size.
"""

from ..arch.structure import unwrapped
from .files import (
    CAMVID11,
    MAX_BYTES,
    SHIPPED,
    load_checkpoint,
    located,
    read,
    read_details,
    save_checkpoint,
    stored_dtype,
)
from .layouts import LAYOUTS, layout_names, to_layout
from .named import Weights
from .recognise import from_state_dict
from .wrappers import CheckpointError

__all__ = [
    "CAMVID11",
    "LAYOUTS",
    "MAX_BYTES",
    "SHIPPED",
    "CheckpointError",
    "Weights",
    "from_state_dict",
    "layout_names",
    "load_checkpoint",
    "located",
    "read",
    "read_details",
    "save_checkpoint",
    "stored_dtype",
    "to_layout",
    "unwrapped",
]
