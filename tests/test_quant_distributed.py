"""Quantizer state on two real processes: every rank holds what one process sees of both halves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

import model.build  # noqa: F401  (registers the methods)
from model.quant import Quantizer, TensorSite, build
from utils.config import QuantizerConfig

RANKS = 2
STEPS = 4
START = ("lsq", "lq", "fatnn", "pact")  # methods of which --re_init finds the range
CASES = {
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
}


def images(step: int) -> Tensor:
    """The batch of all ranks, [8, 4, 5, 5]."""
    return torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(step)).abs() * (1 + step)


def make(config: QuantizerConfig) -> Quantizer:
    quantizer = build(
        config, TensorSite(name="layer", channels=4, channel_dim=int(config.tag != "wt"), ndim=4, fan=36)
    )
    assert isinstance(quantizer, Quantizer)
    return quantizer.train()


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
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
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
    assert any(not torch.equal(fresh[key], value) for key, value in first.items() if key != "iteration")
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)


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
