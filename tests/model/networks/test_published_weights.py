"""`--pretrained torchvision` and `timm`: from a cache, and what is said without a network; `timm:NAME.TAG`."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from model import pretrained
from model.networks.build import build_network
from model.networks.torchvision_resnet import ORIGINAL
from tests.main.runs import call
from tests.utils.processes.lines import together
from utils.checkpoint import archive
from utils.config.resolve import read
from utils.config.schema import Config
from utils.errors import UserError

TINY = "timm:test_resnet.r160_in1k"


def config_of(options: str) -> Config:
    """A configuration with imitated images."""
    return read(f"--dataset fake --num_classes 1000 --input_size 64 {options}".split())


@pytest.fixture(autouse=True)
def without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, and nothing that answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def cached(network: nn.Module, tmp_path: Path) -> None:
    """Put a network's state where both libraries keep their files."""
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2])
    repository = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    file = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    safetensors.torch.save_file(network.state_dict(), file)


@pytest.mark.parametrize(
    "options",
    [
        f"--model resnet18 --keyword imagenet,{ORIGINAL}",
        "--model pytorch-resnet18",
        "--model torchvision:resnet18",
    ],
)
def test_torchvisions_weights_from_its_cache(options: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    cached(theirs, tmp_path)
    config = config_of(f"{options} --dataset fake --pretrained torchvision")
    network = build_network(config.model).eval()
    report = pretrained.load_pretrained(network, "torchvision", config)
    assert len(report.loaded) == 122 and report.source == "torchvision"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images), rtol=0, atol=1e-6)


def test_timms_weights_from_the_hubs_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their tag; with another number of classes the error names the last layer, and the dry run what loads."""
    theirs = timm.create_model("test_resnet")
    cached(theirs, tmp_path)
    config = config_of(f"--model {TINY} --pretrained timm")
    network = build_network(config.model)
    assert pretrained.load_pretrained(network, "timm", config).missing == ()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in network.state_dict().items())
    capsys.readouterr()
    line = (
        f"--dataset fake --fake_size 8 -b 4 --num_classes 8 --input_size 64 --model {TINY} --pretrained timm"
    )
    assert call(line) == 2
    assert "--unresume_scope fc leaves these out" in capsys.readouterr().err
    assert call(f"{line} --unresume_scope fc --dry_run") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("from "))
    assert row.split()[1] == "timm:" and row.endswith("loaded, 2 skipped (fc.weight, fc.bias)")


def test_two_processes_begin_with_a_librarys_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the cache; without a network and a cache both end with the same line."""
    cached(timm.create_model("test_resnet"), tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = "--dataset fake --fake_size 8 -b 4 --num_classes 8 --input_size 64 --dry_run --unresume_scope fc"
    done = together(
        sys.executable,  # the libraries read those variables when they are loaded
        tmp_path,
        {
            "timm": {"world": 2, "line": f"{line} --model {TINY} --pretrained timm"},
            "missing": {"world": 2, "line": f"{line} --model torchvision:alexnet --pretrained torchvision"},
        },
    )
    assert done["timm"]["status"] == [0, 0], done["timm"]["said"]
    assert done["missing"]["status"] == [2, 2], done["missing"]["said"]
    assert len(set(done["missing"]["said"])) == 1 and "cannot fetch https://" in done["missing"]["said"][0]


@pytest.mark.parametrize(
    ("options", "source", "texts"),
    [
        (
            "--model torchvision:resnet18",
            "torchvision",
            [
                "cannot fetch https://download.pytorch.org/models/resnet18-",
                "put it at {}/torch/hub/checkpoints/",
            ],
        ),
        (
            f"--model {TINY}",
            "timm",
            [
                "cannot fetch https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors (",
                f"put it into weights/{TINY} and write --pretrained model.safetensors",
            ],
        ),
        ("--model torchvision:resnet18", "timm", ["is of torchvision; write --pretrained torchvision"]),
        ("--model resnet20", "torchvision", ["torchvision has no weights for --model resnet20"]),
        ("--model vgg_small", "timm", ["timm has no weights for --model vgg_small"]),
    ],
)
def test_what_cannot_be_had_is_one_line(options: str, source: str, texts: list[str], tmp_path: Path) -> None:
    config = config_of(f"{options} --keyword cifar10,cbas,origin --pretrained {source}")
    with pytest.raises(UserError) as error:
        pretrained.load_pretrained(nn.Identity(), source, config)
    assert "\n" not in str(error.value)
    for text in texts:
        assert text.format(tmp_path) in str(error.value)


def test_a_server_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default of sockets, the weights of torchvision would be waited for forever."""
    monkeypatch.setattr("utils.data.download.PATIENCE", 0.1)
    monkeypatch.setattr("urllib.request._opener", None)  # it has read the proxy already
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match=r"cannot fetch https://download.pytorch.org/.*timed out"):
            pretrained.load_pretrained(
                nn.Identity(),
                "torchvision",
                config_of("--model torchvision:resnet18 --pretrained torchvision"),
            )


def test_an_unknown_tag_names_close_ones() -> None:
    with pytest.raises(
        UserError,
        match=r"timm:resnet18\.a1_in2k: no such pretrained tag; did you mean timm:resnet18\.a1_in1k",
    ):
        build_network(config_of("--model timm:resnet18.a1_in2k").model)


def test_a_file_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are the payload; cut short it is damaged; without the package the line says what to install."""
    path = tmp_path / "a.safetensors"
    state = nn.Linear(3, 2).state_dict()
    safetensors.torch.save_file(state, path)
    assert all(torch.equal(archive.read(path)[name], value) for name, value in state.items())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="damaged, cut short"):
        archive.read(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"needs the package safetensors .*: pip install safetensors"):
        archive.read(path)
