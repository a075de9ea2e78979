"""Batch norms over all processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from model.layers.norms import ReverseBatchNorm2d
from model.layers.sync_norm import synchronise
from utils.errors import UserError


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A group of this one process."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, ReverseBatchNorm2d])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronised_norms_are_the_norms_of_all_images(
    alone: None, kind: type[nn.BatchNorm2d], momentum: float | None
) -> None:
    """Output, gradients and running statistics are torch's, also for a large mean; names stay."""
    torch.manual_seed(0)
    norm, other = (nn.Sequential(kind(4, momentum=momentum)) for _ in range(2))
    nn.init.uniform_(norm[0].weight), nn.init.normal_(norm[0].bias)
    other.load_state_dict(norm.state_dict())
    assert synchronise(other, torch.device("cpu")) == 1
    for _ in range(2):
        x = torch.randn(6, 4, 3, 3).mul_(3).add_(100).requires_grad_()
        y = x.detach().clone().requires_grad_()
        weight = torch.randn(6, 4, 3, 3)
        (norm(x) * weight).sum().backward()
        (other(y) * weight).sum().backward()
        torch.testing.assert_close(other(y), norm(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-5)
    for (name, one), two in zip(norm.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5, msg=name)
    norm.eval(), other.eval()
    torch.testing.assert_close(other(x), norm(x), rtol=1e-4, atol=1e-4)


def test_norms_that_cannot_be_synchronised(alone: None) -> None:
    with pytest.raises(UserError, match="--sync_bn: 0 is a BatchNorm1d"):
        synchronise(nn.Sequential(nn.BatchNorm1d(3)), torch.device("cpu"))
    with pytest.raises(UserError, match="has no batch norm"):
        synchronise(nn.Sequential(nn.GroupNorm(1, 3)), torch.device("cpu"))
