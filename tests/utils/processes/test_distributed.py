"""Several real processes over gloo: they train what one trains, resume each other, and end together."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kill import free_port
from tests.utils.data.helpers import write_folder
from tests.utils.processes.lines import FILES, LINE, NO_DROPOUT, together
from utils.checkpoint.archive import read
from utils.config.schema import DeviceConfig
from utils.errors import TrainingError, UserError
from utils.processes.distributed import Place, device_of, int_of, joined, launchers, place
from utils.processes.interrupt import SAVED
from utils.report.epoch_files import MetricsFile

WEIGHTS = "weights/tiny"
OFF = """
init:
  - {tag: fm, enable: false}
epoch:
  - {at: 1, tag: wt, enable: false}
  - {at: 2, enable: true}
"""
GO_ON = f"--resume_file {WEIGHTS}"
SLOW = f"{LINE} -b 8 --save_every 1 --delay 0.5"  # it is ended soon
SPOILS = """
import os
import torch

class Spoil(nn.Module):
    # Infinite in the second process from its fourth pass on.
    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += self.training
        return x / (0 if os.environ["RANK"] == "1" and self.passes > 3 else 1)

def spoils(config):
    network = tiny(config)
    network.insert(3, Spoil())
    return network

register_model("spoils", spoils)
"""
SOURCES = ["imagenet", *(["dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else [])]
METHODS = "--ema_decay 0.9 --dampen 0.01 --quant_loss 0.1 --focal_gamma 1"
RUNS: dict[str, dict[str, Any]] = {
    "one": {"world": 1, "line": f"{LINE} -b 16 --case one"},
    "two": {"world": 2, "line": f"{LINE} -b 8 --case two"},
    "one-two": {"world": 2, "line": f"{LINE} -b 8 --case one-two {GO_ON}/one-epoch1-checkpoint.pth.tar"},
    "two-one": {"world": 1, "line": f"{LINE} -b 16 --case two-one {GO_ON}/two-epoch1-checkpoint.pth.tar"},
    "ended": {"world": 2, "line": f"{SLOW} --case ended", "signal": "SIGTERM", "whom": [1],
              "when": f"{WEIGHTS}/ended-backup1-checkpoint.pth.tar"},
    "mid-one": {"world": 1, "line": f"{LINE} -b 16 --case mid-one {GO_ON}/ended-checkpoint.pth.tar"},
    "continued": {"world": 2, "line": f"{LINE} -b 8 --case ended -r"},
    "killed": {"world": 2, "line": f"{SLOW} --case killed", "signal": "SIGKILL", "whom": [1],
               "when": f"{WEIGHTS}/killed-checkpoint.pth.tar"},
    "evaluated": {"world": 2, "line": f"{LINE} -b 8 -e --case eval --pretrained {WEIGHTS}/one-checkpoint.pth.tar"},
    "init-one": {"world": 1, "line": f"{LINE.replace('--stable 5', '--re_init')} -b 16 --case init-one --epochs 1"},
    "init-two": {"world": 2, "line": f"{LINE.replace('--stable 5', '--re_init')} -b 8 --case init-two --epochs 1"},
    "methods-one": {"world": 1, "line": f"{LINE} {METHODS} -b 16 --case methods-one"},
    "methods-two": {"world": 2, "line": f"{LINE} {METHODS} -b 8 --case methods-two"},
    # With seed 0 a norm puts out 2e-7 in the first step, whose sign, and so the ReLU's gradient, is that of rounding.
    "iter-one": {"world": 1, "line": f"{LINE.replace('--stable 5', '')} -b 8 --iter_size 2 --seed 1 --case iter-one"},
    "iter-two": {"world": 2, "line": f"{LINE.replace('--stable 5', '')} -b 4 --iter_size 2 --seed 1 --case iter-two"},
    "off-one": {"world": 1, "line": f"{LINE} -b 16 --case off-one --policy off.yaml"},
    "off-two": {"world": 2, "line": f"{LINE} -b 8 --case off-two --policy off.yaml"},
    "off-iter": {"world": 2, "line": f"{LINE} -b 4 --iter_size 2 --stable 10 --case off-iter --policy off.yaml"},
    "spoiled": {"world": 2, "line": f"{LINE.replace('tiny', 'spoils')} -b 8 --case spoiled --epochs 1"},
    "half": {"world": 2, "line": f"{LINE} -b 8 --case half --epochs 1 --fp16 --opt_level O2 --amp_dtype float16"},
}  # fmt: skip
FILE_RUNS: dict[str, dict[str, Any]] = {
    f"{name}-{what}": {"world": 1, "line": f"{FILES} --dataset {name} --case {name}-{what} -b 8 -j 0"} | change
    for name in SOURCES
    for what, change in {
        "one": {},
        "two": {"world": 2, "line": f"{FILES} --dataset {name} --case {name}-two -b 4 -j 0"},
        "ended": {"line": f"{FILES} --dataset {name} --case {name}-ended -b 8 -j 0 --save_every 1 --delay 0.3",
                  "signal": "SIGTERM", "whom": [0], "when": f"{WEIGHTS}/{name}-ended-backup1-checkpoint.pth.tar"},
        "continued": {"line": f"{FILES} --dataset {name} --case {name}-ended -b 8 -j 1 -r"},
    }.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, interpreter: str) -> dict[str, Any]:
    """The runs on computed images."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "off.yaml").write_text(OFF)
    (folder / "network.py").write_text(NO_DROPOUT + SPOILS)
    return together(interpreter, folder, RUNS)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, interpreter: str) -> dict[str, Any]:
    """The runs on image files."""
    folder = tmp_path_factory.mktemp("files")
    write_folder(folder / "images", train=24, val=5)
    (folder / "network.py").write_text(NO_DROPOUT)
    return together(interpreter, folder, FILE_RUNS)


def payload(done: dict[str, Any], case: str) -> dict[str, Any]:
    """The latest checkpoint of a case."""
    return read(done["folder"] / WEIGHTS / f"{case}-checkpoint.pth.tar")


def metrics(done: dict[str, Any], case: str) -> list[dict[str, float]]:
    """The rows of a case but for the times and for what the run does not have."""
    rows = MetricsFile.read(done["folder"] / "exp" / case / "metrics.csv")
    times = ("seconds", "images_per_second", "data_wait")
    return [
        {name: value for name, value in row.items() if name not in times and not math.isnan(value)}
        for row in rows
    ]


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "case",
    [
        "one",
        "two",
        "one-two",
        "two-one",
        "continued",
        "evaluated",
        "init-two",
        "iter-one",
        "iter-two",
        "half",
        "off-two",
        "off-iter",
        "methods-one",
        "methods-two",
    ],
)
def test_status(done: dict[str, Any], case: str) -> None:
    assert set(done[case]["status"]) == {0}, done[case]["said"]


def test_methods_of_training_in_two_processes(done: dict[str, Any]) -> None:
    """Losses, penalties and averages are those of one process with the doubled batch."""
    one, two = payload(done, "methods-one"), payload(done, "methods-two")
    assert_close(one["state_dict"], two["state_dict"])
    assert_close(one["methods"]["average"]["weights"], two["methods"]["average"]["weights"])
    for mine, expected in zip(metrics(done, "methods-two"), metrics(done, "methods-one"), strict=True):
        assert mine["ema_loss"] == pytest.approx(expected["ema_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("single", "case"),
    [("one", "two"), ("one", "one-two"), ("one", "two-one"), ("one", "mid-one"), ("iter-one", "iter-two")],
)
def test_two_processes_are_one_with_the_doubled_batch(done: dict[str, Any], single: str, case: str) -> None:
    """Weights, statistics, ranges and momentum; so are runs that go on in another number of processes."""
    one, other = payload(done, single), payload(done, case)
    assert one["scheduler"] == other["scheduler"]
    assert_close(one["state_dict"], other["state_dict"])
    for index, state in one["optimizer"]["state"].items():
        torch.testing.assert_close(
            other["optimizer"]["state"][index]["momentum_buffer"],
            state["momentum_buffer"],
            rtol=1e-4,
            atol=1e-5,
        )
    rows = metrics(done, single)[-len(metrics(done, case)) :]
    for row, expected in zip(metrics(done, case), rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
        assert row["val_top1"] == expected["val_top1"]  # 25 images, an odd number: each counts once


@pytest.mark.parametrize("name", SOURCES)
def test_files_in_two_processes(files: dict[str, Any], name: str) -> None:
    """As in one process with the doubled batch; of 15 images, an odd number, each counts once."""
    for case in (f"{name}-one", f"{name}-two"):
        assert set(files[case]["status"]) == {0}, files[case]["said"]
    assert_close(payload(files, f"{name}-one")["state_dict"], payload(files, f"{name}-two")["state_dict"])
    [expected], [row] = metrics(files, f"{name}-one"), metrics(files, f"{name}-two")
    assert row == pytest.approx(expected, rel=1e-3)
    assert row["val_top1"] == expected["val_top1"]
    assert (row["val_top1"] * 15 / 100) == pytest.approx(round(row["val_top1"] * 15 / 100))


@pytest.mark.parametrize("name", SOURCES)
def test_files_go_on_in_the_middle_of_an_epoch(files: dict[str, Any], name: str) -> None:
    """With another number of workers, to the same bits as a run that was not ended."""
    assert files[f"{name}-ended"]["status"] == [SAVED], files[f"{name}-ended"]["said"]
    assert files[f"{name}-continued"]["status"] == [0], files[f"{name}-continued"]["said"]
    log = (files["folder"] / "exp" / f"{name}-ended" / "log.txt").read_text()
    assert re.search(r"0 epochs and \d+ images of the next are done", log)
    one, two = payload(files, f"{name}-one")["state_dict"], payload(files, f"{name}-ended")["state_dict"]
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    assert metrics(files, f"{name}-one") == metrics(files, f"{name}-ended")


def test_quantizers_that_are_turned_off(done: dict[str, Any]) -> None:
    """Their parameters have no gradient, so that they stay, momentum included, as in one process."""
    one, other = payload(done, "off-one"), payload(done, "off-two")
    assert_close(one["state_dict"], other["state_dict"])
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()


def test_re_init_agrees(done: dict[str, Any]) -> None:
    """Ranges come from the first process's images, for all: its half of the batch of one process."""
    one, two = payload(done, "init-one")["state_dict"], payload(done, "init-two")["state_dict"]
    for name in one:
        if name.endswith("clip_val"):
            assert bool((two[name] > 0).all())
            torch.testing.assert_close(two[name], one[name], rtol=0.5, atol=0)


def test_only_the_first_process_speaks(done: dict[str, Any]) -> None:
    first, second = done["two"]["said"]
    assert "2 processes" in first and "epoch 3/3" in first
    assert second == ""


def test_a_signal_to_one_ends_and_saves_all(done: dict[str, Any]) -> None:
    assert done["ended"]["status"] == [SAVED, SAVED], done["ended"]["said"]
    assert "asked to end by" in done["ended"]["said"][0]


def test_resumed_processes_end_with_the_same_bits(done: dict[str, Any]) -> None:
    one, two = payload(done, "two"), payload(done, "ended")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    assert one["random_of_others"][0]["torch"].equal(two["random_of_others"][0]["torch"])
    assert len(two["random_of_others"]) == 1
    assert metrics(done, "two") == metrics(done, "ended")


def test_a_process_that_dies_ends_the_others(done: dict[str, Any]) -> None:
    status, said = done["killed"]["status"], done["killed"]["said"]
    assert status == [1, -signal.SIGKILL]
    assert "main.py: failed: process 0 lost the others" in said[0] and "Traceback" not in said[0]
    assert "ERROR failed: " in (done["folder"] / "exp" / "killed" / "log.txt").read_text()


def test_a_loss_that_is_not_finite_names_the_first_layer_of_all_processes(done: dict[str, Any]) -> None:
    """The second process's layer 3; the synchronised norm behind it spoils the first process's images too."""
    assert done["spoiled"]["status"] == [1, 1]
    for said in done["spoiled"]["said"]:
        assert "the loss is not finite in epoch 1, iteration 4" in said
        assert "the first layer with such an output is 3; these weights are not saved" in said
    assert not list((done["folder"] / "weights" / "spoils").iterdir())


# Parts -------------------------------------------------------------------------------------------


ADDRESS = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        (DeviceConfig(), {}, Place()),
        (DeviceConfig(), {"WORLD_SIZE": "1", "RANK": "0"}, Place()),
        (DeviceConfig(), {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", **ADDRESS}, Place(3, 1, 4)),
        (DeviceConfig(distributed=True, world_size=2, rank=1), ADDRESS, Place(1, 0, 2)),
        (DeviceConfig(distributed=True), {"WORLD_SIZE": "2", "RANK": "1", **ADDRESS}, Place(1, 0, 2)),
        (DeviceConfig(distributed=True, world_size=1, rank=0), {}, Place()),
    ],
)
def test_place(config: DeviceConfig, environment: dict[str, str], expected: Place) -> None:
    assert place(config, environment) == expected


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        (DeviceConfig(), {"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        (
            DeviceConfig(),
            {"WORLD_SIZE": "2", "RANK": "0", **ADDRESS, "MASTER_ADDR": ""},
            "MASTER_ADDR is not set",
        ),
        (
            DeviceConfig(),
            {"WORLD_SIZE": "2", "RANK": "0", **ADDRESS, "MASTER_PORT": "x"},
            "MASTER_PORT is 'x'",
        ),
        (
            DeviceConfig(),
            {"WORLD_SIZE": "2", "RANK": "0", **ADDRESS, "MASTER_PORT": "0"},
            "is 0: set it to a port",
        ),
        (DeviceConfig(), {"WORLD_SIZE": "2", "RANK": "0", **ADDRESS, "MASTER_PORT": "65536"}, "1 to 65535"),
        (DeviceConfig(), {"WORLD_SIZE": "2", **ADDRESS}, "needs --rank"),
        (DeviceConfig(), {"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'"),
        (DeviceConfig(), {"WORLD_SIZE": "2", "RANK": "2", **ADDRESS}, "rank 2 of 2"),
        (DeviceConfig(distributed=True), {}, "--distributed needs --world_size"),
        (
            DeviceConfig(distributed=True, world_size=3, rank=0),
            {"WORLD_SIZE": "2", **ADDRESS},
            "--world_size 3 contradicts",
        ),
    ],
)
def test_places_that_cannot_be(config: DeviceConfig, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        place(config, environment)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Without a launcher, which would end the others."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with (
        pytest.raises(TrainingError, match=f"process {rank} could not join the other 1 at 127.0.0.1:"),
        joined(Place(rank, rank, 2), torch.device("cpu"), joining=timedelta(seconds=1)),
    ):
        pytest.fail("joined nobody")


def test_launchers_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart by the same launcher still finds the run."""
    environment = {"TORCHELASTIC_RUN_ID": "job"}
    (known,) = launchers(environment)
    assert known.split()[1] == str(os.getppid()) and "job" not in known

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError("no /proc here")

    monkeypatch.setattr(Path, "read_text", missing)
    (found,) = launchers(environment)
    assert found == f"{socket.gethostname()} {os.getppid()} job"
    assert launchers({}) == ()


def test_numbers_of_the_environment() -> None:
    assert int_of({}, "A", 3) == 3 and int_of({"A": "7"}, "A", 3) == 7
    with pytest.raises(UserError, match="A is '-1'"):
        int_of({"A": "-1"}, "A", 3)


def test_without_a_gpu_the_cpu_takes_the_place_of_the_first_alone() -> None:
    """With a warning where it is named; other GPUs that are named were meant."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    device, warnings = device_of(Place(), DeviceConfig(ids=(0,)))
    assert device.type == "cpu" and warnings == ("--device_ids 0: no GPU is available, running on the CPU",)
    assert device_of(Place(), DeviceConfig())[1] == ()
    for ids, shown in (((99,), "99"), ((0, 1), "0 1")):
        with pytest.raises(UserError, match=f"^--device_ids {shown}: no GPU is available; write -g 0"):
            device_of(Place(), DeviceConfig(ids=ids))
