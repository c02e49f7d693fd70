"""Fast-SCNN (Poudel, Liwicki, Cipolla, BMVC 2019) with fused inference kernels.

from fastscnn_fast import FastSCNN, fuse
model = FastSCNN(num_classes=19)     # plain torch, trainable
fast = fuse(model)                   # logits: fast(x); uint8 labels: fast.labels(x)
"""

from .checkpoints import load_checkpoint
from .compat import accelerate
from .fused import FusedFastSCNN, fuse
from .model import FastSCNN
from .segment import segment

__version__ = "0.1.0"

__all__ = ["FastSCNN", "FusedFastSCNN", "accelerate", "fuse", "load_checkpoint", "segment"]
