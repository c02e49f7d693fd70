"""Drop-in for ``models/fast_scnn.py`` of Tramac/Fast-SCNN-pytorch: change one import line.

    from fastscnn_fast.compat.tramac import get_fast_scnn  # was: from models.fast_scnn import get_fast_scnn

Signatures, state_dict keys and tuple results are Tramac's; the network is this package's, with its fused
kernels in eval mode under ``torch.no_grad()``.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from ..checkpoints import layout_names, read
from ..runtime import model

_ACRONYMS = {
    "pascal_voc": "voc",
    "pascal_aug": "voc",
    "ade20k": "ade",
    "coco": "coco",
    "citys": "citys",
}
_CLASSES = {"voc": 21, "ade": 150, "coco": 21, "citys": 19}


class FastSCNN(model.FastSCNN):
    """Tramac's FastSCNN: (N, 3, H, W) -> ``(logits,)`` or, with ``aux``, ``(logits, auxiliary)``, full size.

    Args:
        num_classes: number of classes K.
        aux: build the auxiliary head; its result is returned in eval mode too.
        kwargs: fields of :class:`fastscnn_fast.arch.config.Config` (``mean``, ``std``, widths).

    Raises:
        ValueError: an impossible combination, or a network that Tramac's code could not be.
    """

    def __init__(self, num_classes: int, aux: bool = False, **kwargs: Any) -> None:
        super().__init__(num_classes, "tramac", aux, **kwargs)
        layout_names(self.config, "tramac")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        result = super().forward(x)
        if not self.auxiliary:
            return (result,)
        if self.training:
            logits, auxiliary = result
            return (logits, *auxiliary)
        return (result, *self.auxiliary_logits(x))

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """The tensors under Tramac's names."""
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for ours, theirs in layout_names(self.config, "tramac").items():
            state[prefix + theirs] = state.pop(prefix + ours)
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Renames in place, and reports what is missing or mis-shaped under Tramac's names."""
        own: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for ours, theirs in layout_names(self.config, "tramac").items():
            tensor = state_dict.pop(prefix + theirs, None)
            if tensor is None and not theirs.endswith("num_batches_tracked"):
                missing_keys.append(prefix + theirs)
            elif tensor is not None and tensor.shape != own[ours].shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{theirs}: copying a param with shape {tensor.shape} from"
                    f" checkpoint, the shape in current model is {own[ours].shape}."
                )
                tensor = None
            state_dict[prefix + ours] = own[ours] if tensor is None else tensor
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def get_fast_scnn(
    dataset: str = "citys",
    pretrained: bool = False,
    root: str | os.PathLike[str] = "./weights",
    map_cpu: bool = False,
    **kwargs: Any,
) -> FastSCNN:
    """Tramac's builder: the network for a data set, on the CPU.

    Args:
        dataset: "citys" (19 classes), "pascal_voc", "pascal_aug", "coco" (21) or "ade20k" (150).
        pretrained: load ``root/fast_scnn_citys.pth`` (or ``_voc``, ``_ade``, ``_coco``).
        map_cpu: accepted for compatibility: weights always load through the CPU.
        kwargs: arguments of :class:`FastSCNN`.

    Raises:
        ValueError: unknown data set, or a file that is no state_dict (:class:`fastscnn_fast.checkpoints.CheckpointError`).
        FileNotFoundError: no such file.
        RuntimeError: weights of another network, as of ``load_state_dict``.
    """
    if dataset not in _ACRONYMS:
        raise ValueError(f"dataset must be one of {', '.join(_ACRONYMS)}, got {dataset!r}")
    acronym = _ACRONYMS[dataset]
    network = FastSCNN(_CLASSES[acronym], **kwargs)
    if pretrained:
        network.load_state_dict(read(os.path.join(root, f"fast_scnn_{acronym}.pth"))[0])
    return network
