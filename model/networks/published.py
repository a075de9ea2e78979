"""The weights that torchvision and timm publish: `--pretrained torchvision`, `--pretrained timm`.

The packages are imported where they are used: other networks need not wait for them.
"""

from __future__ import annotations

import http.client
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from model.networks import library
from utils.checkpoint import archive
from utils.config.schema import ModelConfig
from utils.data.download import patient
from utils.errors import UserError

# Of a failed download: no network, a server's answer, a wrong digest.
_FAILED = (OSError, RuntimeError, http.client.HTTPException)


def published_weights(source: str, config: ModelConfig, folder: Path) -> dict[str, Any]:
    """The weights that a library publishes for a network, from its cache or else from the network.

    Args:
        source: `torchvision` (its newest weights) or `timm` (those of the tag in `timm:NAME.TAG`, or its default).
        config: the network, one of that library, or one of ours that has the same name there.
        folder: where a file may lie that the user downloads; it is named in messages.

    Raises:
        UserError: there are no such weights, or they cannot be fetched, with the file to put somewhere.
    """
    of, colon, name = config.name.partition(":")
    if colon and of != source:
        raise UserError(f"--pretrained {source}: --model {config.name} is of {of}; write --pretrained {of}")
    if not colon:
        name = config.name.removeprefix("pytorch-")
    return _of_torchvision(name, config) if source == "torchvision" else _of_timm(name, config, folder)


def _of_torchvision(name: str, config: ModelConfig) -> dict[str, Any]:
    """The file of torchvision's default weights, in the cache of `torch.hub`."""
    import torchvision

    if name not in library.torchvision_names():
        raise _no_weights("torchvision", config)
    url = torchvision.models.get_model_weights(name)["DEFAULT"].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlparse(url).path)
    if not path.is_file():
        digest = path.stem.rpartition("-")[2]  # the file's name ends with the first digits of its SHA-256
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with patient():
                torch.hub.download_url_to_file(url, str(path), digest, progress=False)
        except _FAILED as error:
            raise UserError(
                f"--pretrained torchvision: cannot fetch {url} ({_reason(error)}); download it where there is a "
                f"network and put it at {path}"
            ) from error
    return archive.read(path)


def _of_timm(name: str, config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """The state of timm's network with its weights, which timm converts where they have other names."""
    timm = library.imported_timm(f"--pretrained timm for {config.name}")
    if name.partition(".")[0] not in timm.list_models():
        raise _no_weights("timm", config)
    known = timm.models.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise _no_weights("timm", config)
    overlay, where = {}, known.url
    try:
        if known.hf_hub_id:
            import huggingface_hub

            file = known.hf_hub_filename or "model.safetensors"
            where = f"https://huggingface.co/{known.hf_hub_id}/resolve/main/{file}"
            # Looked up first: without a network a download waits before it takes what is there.
            found = huggingface_hub.try_to_load_from_cache(known.hf_hub_id, file)
            if not isinstance(found, str):
                found = huggingface_hub.hf_hub_download(known.hf_hub_id, file)
            overlay = {"file": found}
        network = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **library.timm_size(name, config)
        )
    except _FAILED as error:
        raise UserError(
            f"--pretrained timm: cannot fetch {where} ({_reason(error)}); download it where there is a network, put it "
            f"into {folder} and write --pretrained {str(where).rpartition('/')[2]}"
        ) from error
    return network.state_dict()


def _no_weights(source: str, config: ModelConfig) -> UserError:
    return UserError(
        f"--pretrained {source}: {source} has no weights for --model {config.name}; name a file, or "
        f"another network, such as --model {source}:resnet18"
    )


def _reason(error: BaseException) -> str:
    """The first sentence of an error, without its full stop."""
    return " ".join(str(getattr(error, "reason", error)).split()).partition(". ")[0]
