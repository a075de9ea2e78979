"""A network as a program of torch.export: it runs with torch alone and computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.deploy import program
from model.load import load
from tests.model.deploy.test_packed import IMAGES, network_of
from tests.model.test_load import saved
from tests.utils.tools.commands import Call
from utils.errors import UserError

ALONE = """
import json, sys, torch
images = torch.load("images.pt")
for name in sys.argv[1:]:
    extra = {"classes.json": "", "images.json": ""}
    network = torch.export.load(f"{name}.pt2", extra_files=extra).module()
    with torch.no_grad():
        torch.save([network(images), network(images[:1])], f"{name}.out")
    print(extra["classes.json"], extra["images.json"], sep="|")
assert not {"model", "utils"} & set(sys.modules)
"""
CASES = {"lsq-restored": 4, "lq": 4, "xnor": 2}


@pytest.mark.slow
def test_programs_run_with_torch_alone(tmp_path: Path) -> None:
    """In a process that cannot import the repository, with batches of other sizes."""
    torch.manual_seed(0)
    images = torch.randn(5, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    networks = {name: network_of(name, levels) for name, levels in CASES.items()}
    for name, trained in networks.items():
        program.write(trained, tmp_path / f"{name}.pt2")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *networks],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (name, trained), line in zip(networks.items(), done.stdout.splitlines(), strict=True):
        classes, described = map(json.loads, line.split("|"))
        assert classes == list("0123456") and described == IMAGES.to_dict()
        batch, single = torch.load(tmp_path / f"{name}.out")
        with torch.no_grad():
            assert torch.equal(batch, trained.network(images)), name
            assert torch.equal(single, trained.network(images[:1])), name


class Changing(nn.Module):
    """A network that looks at its values, which torch.export does not take."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_network_that_torch_refuses_is_one_line(tmp_path: Path) -> None:
    trained = replace(network_of("lsq", 4), network=Changing())
    with pytest.raises(UserError, match=r"^x: torch.export does not take the network nin \("):
        program.write(trained, tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_the_word(call: Call, tmp_path: Path) -> None:
    old, new = saved(tmp_path / "x.pth"), tmp_path / "x.pt2"
    assert call("--keyword", "export_program", "--old", old, "--new", new)[0] == 0
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(torch.export.load(new).module()(images), load(old)[0](images))
    assert not torch.export.load(new).module()(images).requires_grad  # it cannot be trained
