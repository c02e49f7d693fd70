"""Models from the Hugging Face Hub and to there, by its own package's mixin (the extra [hub])."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..extras import need
from ..runtime.model import FastSCNN
from ..writing import check_path, write_whole
from .card import card
from .files import load_checkpoint, located, save_checkpoint
from .wrappers import CheckpointError

#: The weights' file in a repository or folder, with all that the network needs in its metadata.
FILE = "model.safetensors"
_CONFIG = "config.json"  # by it the Hub counts downloads
#: What the Hub finds models by; ``model_card_kwargs`` adds to it.
_DATA: dict[str, Any] = {
    "library_name": "fastscnn_fast",
    "pipeline_tag": "image-segmentation",
    "tags": ["fast-scnn", "semantic-segmentation", "pytorch"],
}


def from_pretrained(source: str | os.PathLike[str], **options: Any) -> FastSCNN:
    """The model of :meth:`FastSCNN.from_pretrained`, whose arguments and errors these are."""
    check_path(source)
    if located(source).is_file():
        return load_checkpoint(source, **options)
    if os.path.isdir(source):
        if not Path(source, FILE).is_file():
            rule = f"must hold {FILE}, as save_pretrained writes it"
            raise CheckpointError(f"{source}: {rule}: load_checkpoint takes other files")
    elif not isinstance(source, str):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(source))
    model: FastSCNN = _mixin().from_pretrained(source, **options).model
    return model


def on_hub(model: FastSCNN, details: Mapping[str, Any] | None, name: str | None = None) -> Any:
    """What has the ``save_pretrained`` and ``push_to_hub`` of huggingface_hub's ModelHubMixin for a model."""
    made = _mixin()()
    made.model, made.details, made.name = model, details, name
    return made


@cache
def _mixin() -> Any:
    """The class of :func:`on_hub`.

    Raises:
        ImportError: huggingface_hub is missing.
    """
    need("the Hugging Face Hub", "hub", "huggingface_hub")
    import huggingface_hub as hub

    class OnHub(hub.ModelHubMixin):  # type: ignore[misc]
        """A model, and what its card says of it."""

        model: FastSCNN
        details: Mapping[str, Any] | None
        name: str | None

        def __init__(
            self,
        ) -> None:  # without arguments, into which the mixin would put a config's values
            super().__init__()

        def _save_pretrained(self, save_directory: Path) -> None:
            save_checkpoint(self.model, save_directory / FILE, self.details)
            config = load_checkpoint(save_directory / FILE).config.to_dict()
            write_whole(save_directory / _CONFIG, json.dumps(config, indent=2).encode())

        @classmethod
        def _from_pretrained(
            cls,
            *,
            model_id: str,
            revision: str | None,
            cache_dir: str | Path | None,
            force_download: bool,
            local_files_only: bool,
            token: str | bool | None,
            **overrides: Any,
        ) -> OnHub:
            made = cls()
            file: str | Path = Path(model_id, FILE)
            if not os.path.isdir(model_id):
                file = hub.hf_hub_download(
                    *(model_id, FILE),
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            made.model = load_checkpoint(file, **overrides)
            return made

        def generate_model_card(self, **fields: Any) -> hub.ModelCard:
            data = hub.ModelCardData(**_DATA | fields).to_yaml()
            return hub.ModelCard(f"---\n{data}\n---\n\n{card(self.model, self.details, self.name)}")

    return OnHub
