"""Networks that have learned the digits: exported files have the classes and the accuracy of torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from model.deploy import packed
from model.deploy.engines import Engine
from model.deploy.graph import deploy_graph
from model.deploy.onnx_qdq import qdq_model
from model.deploy.openvino_ir import write_openvino
from model.load import data_of, load_trained, trained_from
from tests.main.runs import done_in

SIZE = 8
START = (
    f"--keyword digits,origin,cbsa,fix --width_alpha 0.25 --input_size {SIZE} -v 360 --seed 1 -b 64 "
    "--lr_policy sgdr"
)
METHODS = {
    "lsq-2": "dorefa,lsq --bits 2",
    "pact-ternary": "pact --bits ternary --wt_adaptive var-mean",
    "dorefa-1": "dorefa,wt_bin --bits 1 --fm_boundary 3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network in full precision that has learned the digits."""
    return done_in(tmp_path_factory.mktemp("runs"), f"{START} --case fp --epochs 4 --lr 0.1 --wakeup_epoch 1")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_files_classify_as_torch_does(method: str, folder: Path) -> None:
    words, _, options = METHODS[method].partition(" ")
    line = f"{START.replace('fix ', f'fix,{words} ')} {options} --re_init --pretrained fp-checkpoint.pth.tar"
    done_in(folder, f"{line} --case {method} --epochs 2 --lr 0.05")
    trained = load_trained(folder / "weights" / "resnet20" / f"{method}-checkpoint.pth.tar")
    loaders = data_of(trained, train=True)
    assert loaders.train is not None and loaders.val is not None
    loaders.train.set_epoch(0)
    batches = [*loaders.val, *loaders.train]
    images = torch.cat([batch for batch, _ in batches]).contiguous()
    target = torch.cat([classes for _, classes in batches]).numpy()
    with torch.no_grad():
        logits = trained.network(images)
    wanted = logits.argmax(1).numpy()
    assert (wanted == target).mean() > 0.5

    path = folder / f"{method}.onnx"
    graph = deploy_graph(trained.network, (3, SIZE, SIZE))
    onnx.save(qdq_model(graph), path)
    write_openvino(graph, path.with_suffix(".xml"))
    for file, engine in (
        (path, Engine("onnxruntime")),
        (path, Engine("openvino")),
        (path.with_suffix(".xml"), Engine("openvino")),
    ):
        found = engine.open(file, threads=1)(images.numpy())["logits"].argmax(1)
        assert (found == wanted).mean() >= 0.999, (file.suffix, engine)
        assert abs(np.mean(found == target) - np.mean(wanted == target)) <= 0.001
    packed.write(trained, path.with_suffix(".safetensors"))
    restored = trained_from(packed.read_checkpoint(path.with_suffix(".safetensors")), path).network
    with torch.no_grad():
        assert torch.equal(restored(images), logits)
