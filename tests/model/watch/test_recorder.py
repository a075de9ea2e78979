"""What a run records of each epoch: quantizers always, TensorBoard's files when asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import main
from model.networks import build
from model.watch.recorder import Recorder
from utils.config.resolve import read as read_config
from utils.config.schema import Config
from utils.report.epoch_files import RecordsFile

TINY = "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 --fake_size 32 --keyword cifar10,cbas,origin"
BITS = ",dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
LOGGER = logging.getLogger("test")


def made(options: str) -> tuple[nn.Module, Config]:
    """The network and configuration of a command line."""
    config = read_config(f"{TINY}{options}".split())
    return build.build_network(config.model), config


def images() -> Tensor:
    return torch.randn(100, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_line_per_epoch(tmp_path: Path) -> None:
    """With every quantizer of the network, from the same images each time."""
    model, config = made(BITS)
    asked = []

    def ask() -> Tensor:
        asked.append(None)
        return images()

    recorder = Recorder(tmp_path, model, config, 0)
    for epoch in (1, 2):
        recorder.epoch({"epoch": epoch, "train_loss": 1.0}, ask, LOGGER)
    first, second = RecordsFile.read(tmp_path / "quantizers.jsonl")
    assert (first["epoch"], second["epoch"], len(asked)) == (1, 2, 1)
    assert len(first["quantizers"]) == 40
    assert first["quantizers"] == second["quantizers"]  # nothing was trained
    assert sum(first["quantizers"][0]["histogram"]["counts"]) == 64 * 8 * 16 * 16  # of 100 images
    assert [path.name for path in tmp_path.iterdir()] == ["quantizers.jsonl"]


def test_full_precision_has_no_quantizers(tmp_path: Path) -> None:
    model, config = made(" --tensorboard")
    recorder = Recorder(tmp_path, model, config, 0)
    recorder.epoch({"epoch": 1, "train_loss": 1.0}, lambda: pytest.fail("asked for images"), LOGGER)
    recorder.board.close()
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"weights/conv1", "weights/layer3.2.conv2.0", "weights/fc"} <= set(events.Tags()["histograms"])


def test_events_are_there_after_each_epoch(tmp_path: Path) -> None:
    """What a killed run has done can be looked at."""
    model, config = made(" --tensorboard")
    recorder = Recorder(tmp_path, model, config, 0)
    recorder.epoch({"epoch": 1, "train_loss": 0.5}, images, LOGGER)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train_loss")] == [(1, 0.5)]
    recorder.board.close()


def test_images_are_shown_as_given_and_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The normalisation is undone; what the network gets is stretched to what can be shown."""
    model, config = made("")
    recorder = Recorder(tmp_path, model, config, 0)
    shown: dict[str, Tensor] = {}
    monkeypatch.setattr(recorder.board, "images", lambda tag, given, step: shown.update({tag: given}))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    plain = torch.rand(40, 3, 4, 4)
    given = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    recorder.show(given, mean, std, 0)
    torch.testing.assert_close(shown["training images/denormalised"], plain[:32])
    stretched = shown["training images/as given"]
    assert (stretched.amin(), stretched.amax(), len(stretched)) == (0, 1, 32)


def test_a_resumed_run_has_each_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run had written of epochs that it does again is replaced; the end is that of one run."""
    monkeypatch.chdir(tmp_path)
    line = f"{TINY}{BITS} --re_init --lr_policy fix"
    assert main.main(f"{line} --case whole --epochs 2".split()) == 0
    assert main.main(f"{line} --case parts --epochs 1".split()) == 0
    path = tmp_path / "exp" / "parts" / "quantizers.jsonl"
    (record,) = RecordsFile.read(path)
    with path.open("a") as file:
        file.write(json.dumps({**record, "epoch": 2}) + '\n{"epoch": 3')
    assert main.main(f"{line} --case parts --epochs 2 -r".split()) == 0
    whole = RecordsFile.read(tmp_path / "exp" / "whole" / "quantizers.jsonl")
    assert RecordsFile.read(path) == whole
    assert [record["epoch"] for record in whole] == [1, 2]


def test_an_epoch_that_begins_in_its_middle_is_compared_with_nothing(tmp_path: Path) -> None:
    """The weights at its begin are not known; the next one is compared with its end."""
    model, config = made(BITS)
    recorder = Recorder(tmp_path, model, config, 4, position=8)
    for epoch in (5, 6):
        recorder.epoch({"epoch": epoch, "train_loss": 1.0}, images, LOGGER)
    first, second = RecordsFile.read(tmp_path / "quantizers.jsonl")
    for name in ("changed", "update"):
        assert {row[name] for row in first["quantizers"]} == {None}
        assert {row[name] for row in second["quantizers"] if row["tag"] == "wt"} == {0.0}
    rest = [
        [{k: v for k, v in row.items() if k not in ("changed", "update")} for row in each["quantizers"]]
        for each in (first, second)
    ]
    assert rest[0] == rest[1]
