"""Opening and running exported files from Python: what is no image, no engine or no network is said in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.deploy.engines import Engine, engines_of
from model.deploy.formats import ENDINGS, GRAPH_FORMATS
from model.deploy.graph import deploy_graph
from utils.errors import UserError


@pytest.mark.parametrize("kind", ["c", "executorch", "litert", "mnn"])
def test_what_is_no_batch_of_its_images_is_refused(kind: str, tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    images = json.dumps({"channels": 3, "height": 6, "width": 5})
    path = tmp_path / f"x{ENDINGS[kind]}"
    GRAPH_FORMATS[kind](deploy_graph(network, (3, 6, 5), metadata={"images": images}), path)
    runner = engines_of(path)[0].open(str(path))
    x = np.zeros((2, 3, 6, 5), np.float32)
    assert runner(x)["logits"].shape == (2, 2)
    for given, message in (
        (x.astype(np.uint8), "computes normalised images, a NumPy array of float32, and these are uint8"),
        (torch.from_numpy(x), "and these are torch.float32"),
        (x.tolist(), "and these are list"),
        (x[:0], "computes a batch of images of 3x6x5, and this is a batch of 0x3x6x5"),
        (x[0], "and this is a batch of 3x6x5"),
        (np.zeros((1, 3, 8, 8), np.float32), "and this is a batch of 1x3x8x8"),
        (x.transpose(0, 2, 3, 1), "and this is a batch of 2x6x5x3"),
    ):
        with pytest.raises(UserError, match=rf"x\{ENDINGS[kind]}: .*{message}$"):
            runner(given)


def test_engines_and_networks_that_are_none() -> None:
    with pytest.raises(
        UserError, match=r"^lite-rt: no engine; use one of cc, coremltools.*; did you mean litert"
    ):
        Engine("lite-rt").open("x.tflite")
    with pytest.raises(UserError, match=r"^shape \(3, 0, 6\): give channels, height and width"):
        deploy_graph(nn.Conv2d(3, 4, 3), (3, 0, 6))
    with pytest.raises(UserError, match=r"^the network does not run on float32 images of 4x6x6: "):
        deploy_graph(nn.Conv2d(3, 4, 3), (4, 6, 6))
