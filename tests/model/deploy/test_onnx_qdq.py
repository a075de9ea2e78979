"""ONNX files: onnxruntime and OpenVINO compute what torch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from model.deploy.engines import Engine
from model.deploy.onnx_qdq import qdq_model
from tests.model.deploy.networks import exported_methods, images, torch_values

ENGINES = (Engine("onnxruntime"), Engine("onnxruntime", False), Engine("openvino"))


@pytest.fixture(scope="module")
def methods_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "methods.onnx"
    onnx.save(qdq_model(exported_methods()[1]), path)
    return path


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_every_method_gives_the_same_levels(engine: Engine, methods_file: Path) -> None:
    network, graph = exported_methods()
    x = images(4)
    expected = torch_values(network, x)
    found = engine.open(methods_file, tensors=True)(x.numpy())
    assert found.keys() == expected.keys() == {"logits", *graph.activations}
    for name, value in expected.items():
        scale = np.abs(value).max()
        far = np.abs(found[name] - value) > 1e-3 * scale
        assert far.mean() <= (0 if name == "logits" else 1e-3), name
