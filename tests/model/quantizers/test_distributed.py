"""Quantizer state on two real processes: every rank holds what one process sees of both halves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

import model.quant  # noqa: F401  (registers the methods)
from model.layers.convolution import QuantConv2d
from model.quantizers.frame import Quantizer
from model.quantizers.registry import build_quantizer
from model.quantizers.site import LayerSite
from utils.config.schema import QuantConfig, QuantizerConfig

RANKS = 2
STEPS = 4
START = ("lsq", "lq", "fatnn", "pact")  # methods of which --re_init finds the range
CASES = {
    "lsq": QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True),
    "lq": QuantizerConfig(tag="fm", enable=True, method="lq", levels=4, half_range=True),
    "lq-groups": QuantizerConfig(
        tag="fm", enable=True, method="lq", levels=4, half_range=True, quant_group=4
    ),
    "lq-custom-update": QuantizerConfig(
        tag="fm", enable=True, method="lq", levels=4, half_range=True, custom_update=True
    ),
    "lsq-stable": QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True, stable=3),
    "pact-stable": QuantizerConfig(tag="fm", enable=True, method="pact", levels=4, half_range=True, stable=3),
    "dorefa-stable": QuantizerConfig(
        tag="fm", enable=True, method="dorefa", levels=4, half_range=True, stable=3, quant_group=2
    ),
    "lq-stable": QuantizerConfig(tag="fm", enable=True, method="lq", levels=4, half_range=True, stable=2),
    "fatnn-stable": QuantizerConfig(
        tag="fm", enable=True, method="fatnn", levels=4, half_range=True, stable=3
    ),
    "fatnn-closed-form": QuantizerConfig(
        tag="fm", enable=True, method="fatnn", levels=4, half_range=True, closed_form=True
    ),
    "lq-weight": QuantizerConfig(tag="wt", enable=True, method="lq", levels=4),
    "lq-output": QuantizerConfig(tag="ot", enable=True, method="lq", levels=4),
    "lq-adaptive": QuantizerConfig(
        tag="fm", enable=True, method="lq", levels=4, half_range=True, adaptive="var", adaptive_restore=True
    ),
    "lsq-output-stable": QuantizerConfig(
        tag="ot", enable=True, method="lsq", levels=8, stable=3, quant_group=4
    ),
    "lsq-adaptive-stable": QuantizerConfig(
        tag="fm", enable=True, method="lsq", levels=4, adaptive="mean-var", stable=3
    ),
    "lsq-midtread-stable": QuantizerConfig(
        tag="fm", enable=True, method="lsq", levels=4, grid="midtread", stable=3
    ),
    "lsq-weight-stable": QuantizerConfig(
        tag="wt", enable=True, method="lsq", levels=4, grid="midtread", adaptive="var-mean", stable=3
    ),
    "fatnn-ternary-closed-form": QuantizerConfig(
        tag="ot", enable=True, method="fatnn", levels=3, closed_form=True, stable=1
    ),
}


def images(step: int) -> Tensor:
    """The batch of all ranks, [8, 4, 5, 5]."""
    return torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(step)).abs() * (1 + step)


def make(config: QuantizerConfig) -> Quantizer:
    quantizer = build_quantizer(
        config, LayerSite(name="layer", channels=4, channel_dim=int(config.tag != "wt"), ndim=4, fan=36)
    )
    assert isinstance(quantizer, Quantizer)
    return quantizer.train()


def empty_input(config: QuantizerConfig) -> str:
    """What a convolution with this quantizer says to an empty batch in training; empty where it passes."""
    layer = QuantConv2d(4, 4, 3)
    layer.build_quantizers(dataclasses.replace(QuantConfig(), **{config.tag: config}), "head")
    nothing = torch.empty(0, 4, 5, 5)
    assert layer.eval()(nothing).shape == (0, 4, 3, 3)
    try:
        assert layer.train()(nothing).shape == (0, 4, 3, 3)
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    states = {}
    for name, config in CASES.items():
        quantizer = make(config)
        for step in range(STEPS):
            weight = config.tag == "wt"  # the same on every rank
            quantizer(images(step)[:4] if weight else images(step).chunk(RANKS)[rank])
        states[name] = quantizer.state_dict()
    for method in START:
        quantizer = make(QuantizerConfig(tag="fm", enable=True, method=method, levels=4, half_range=True))
        quantizer.initialise_from(images(1).chunk(RANKS)[rank])
        states[f"start-{method}"] = quantizer.state_dict()
    torch.save(states, f"{folder}/{rank}.pt")
    torch.save({name: empty_input(config) for name, config in CASES.items()}, f"{folder}/empty-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def states(folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_with_each_other_and_with_one_process(
    name: str, states: list[dict[str, dict[str, Tensor]]]
) -> None:
    config = CASES[name]
    single = make(config)
    for step in range(STEPS):
        single(images(step)[:4] if config.tag == "wt" else images(step))
    expected = single.state_dict()
    first, second = (state[name] for state in states)
    fresh = make(config).state_dict()
    changed = [key for key, value in first.items() if not torch.equal(fresh[key], value)]
    assert len(changed) > (name != "lsq")  # beside the counter
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_is_refused_where_other_ranks_would_wait(name: str, folder: Path) -> None:
    for rank in range(RANKS):
        said = torch.load(folder / f"empty-{rank}.pt", weights_only=True)[name]
        if CASES[name].tag == "wt" or name == "lsq":
            assert said == ""
        else:
            assert said.startswith(
                "head: an empty input on this process, while others wait for the statistics"
            )
    layer = QuantConv2d(4, 4, 3)  # alone nobody waits
    layer.build_quantizers(dataclasses.replace(QuantConfig(), **{CASES[name].tag: CASES[name]}), "head")
    assert layer(torch.empty(0, 4, 5, 5)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("method", START)
def test_ranks_start_from_the_range_of_all_images(
    method: str, states: list[dict[str, dict[str, Tensor]]]
) -> None:
    single = make(QuantizerConfig(tag="fm", enable=True, method=method, levels=4, half_range=True))
    single.initialise_from(images(1))
    first, second = (state[f"start-{method}"] for state in states)
    for key, value in single.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)
