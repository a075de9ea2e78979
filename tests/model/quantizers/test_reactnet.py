"""ReActNet's thresholds: where they start."""

from __future__ import annotations

import pytest
import torch

from tests.model.quantizers.cases import CHANNELS, Case, make


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_thresholds_start_at_the_mean_of_their_group(groups: int | None) -> None:
    """Behind a ReLU too, both signs then occur; at the start they are 0."""
    x = torch.rand(4, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(8.0).view(
        8, 1, 1
    )
    quantizer = make(Case("reactnet", "fm", 2, half_range=False, quant_group=groups), randomised=False)
    assert not quantizer(x).eq(-1).any()
    quantizer.initialise_from(x)
    by_group = x.movedim(1, 0).reshape(groups or CHANNELS, -1)
    threshold = quantizer.sign_threshold()
    assert threshold is not None
    torch.testing.assert_close(threshold.flatten().unique(), by_group.mean(1))
    signs = quantizer(x).movedim(1, 0).reshape(groups or CHANNELS, -1)
    assert (signs.amax(1) == 1).all() and (signs.amin(1) == -1).all()
