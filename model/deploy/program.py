"""A network as a program of `torch.export`, which runs with torch alone."""

from __future__ import annotations

import copy
import json
import logging
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from model.load import Trained
from utils.checkpoint import archive
from utils.checkpoint.exported import TEXTS
from utils.config.image_size import sides
from utils.errors import UserError


def write(trained: Trained, path: Path) -> None:
    """Write the evaluation network, for batches of any size.

    The file has the texts `classes.json` and `images.json` beside the program: names of the classes, and how an image
    becomes the input (`ImageTransform.to_dict`). Weights are those of the checkpoint in float32: the program
    quantizes them each time it runs. They take no gradients, since the program cannot be trained.

    Args:
        trained: the network.
        path: the file, which `torch.export.load(path).module()` reads.

    Raises:
        UserError: torch cannot export the network.
    """
    example = torch.zeros(2, trained.transform.channels, *sides(trained.transform.size))
    network = copy.deepcopy(trained.network).requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(network, (example,), dynamic_shapes=({0: Dim("batch")},))
        except Exception as error:  # torch has many, without a base
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"{trained.source}: torch.export does not take the network {trained.config.model.name} ({reason}); "
                "write --to packed, or change its code"
            ) from error
        texts = map(json.dumps, (trained.labels, trained.transform.to_dict()))
        extra: dict[str, Any] = dict(zip(TEXTS, texts, strict=True))
        # A file object: torch refuses names that do not end in .pt2.
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files=extra)


def read(path: Path) -> tuple[nn.Module, dict[str, str]]:
    """The network of a program, float32 [N, C, H, W] to logits [N, classes], and the texts `classes` and `images`.

    torch unpickles parts of such files: read only those whose author you trust.

    Raises:
        UserError: the file is missing, damaged or no program.
    """
    extra: dict[str, Any] = dict.fromkeys(TEXTS, "")
    log = logging.getLogger("torch.export")  # it shows tracebacks of damaged files
    former, log.disabled = log.disabled, True
    try:
        with zipfile.ZipFile(path) as file:  # torch looks at no checksum
            if file.testzip() is not None:
                raise ValueError("a wrong checksum")
        with path.open("rb") as file:  # torch warns of names that do not end in .pt2
            network = torch.export.load(file, extra_files=extra).module()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({archive.reason_of(error)}); check the path") from error
    except Exception as error:  # torch has many, without a base
        raise UserError(
            f"{path}: damaged, cut short or no program of torch.export; export it anew from its checkpoint"
        ) from error
    finally:
        log.disabled = former
    return network, {name.removesuffix(".json"): text for name, text in extra.items()}
