"""A network as a program of `torch.export`, which runs with torch alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch.export import Dim

from model.load import Trained
from utils.config.image_size import sides


def write(trained: Trained, path: Path) -> None:
    """Write the evaluation network, for batches of any size.

    The file has the texts `classes.json` and `images.json` beside the program: names of the classes, and how an image
    becomes the input (`ImageTransform.to_dict`). Weights are those of the checkpoint in float32: the program
    quantizes them each time it runs.

    Args:
        trained: the network.
        path: the file, which `torch.export.load(path).module()` reads.
    """
    example = torch.zeros(2, trained.transform.channels, *sides(trained.transform.size))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(trained.network, (example,), dynamic_shapes=({0: Dim("batch")},))
        extra = {
            "classes.json": json.dumps(trained.labels),
            "images.json": json.dumps(trained.transform.to_dict()),
        }
        # A file object: torch refuses names that do not end in .pt2.
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files=extra)
