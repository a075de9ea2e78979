"""RPReLU against its formula in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.layers.rprelu import RPReLU


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (6, 3)])
def test_outputs_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], autocast: bool) -> None:
    """In float32, also where autocast rounds other layers to bfloat16."""
    rng = np.random.default_rng(3)
    state = {name: rng.normal(0, 0.5, 3) for name in ("shift", "offset", "slope")}
    x, arriving = rng.normal(0, 1, shape), rng.normal(0, 1, shape)
    activation = RPReLU(3)
    activation.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    given = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = activation(given)
    assert found.dtype == torch.float32
    found.backward(torch.tensor(arriving, dtype=torch.float32))

    wide = {name: value.reshape(1, 3, *[1] * (len(shape) - 2)) for name, value in state.items()}
    shifted = x - wide["shift"]
    slope = np.where(shifted > 0, 1, wide["slope"])
    others = tuple(dim for dim in range(len(shape)) if dim != 1)
    wanted = {
        "shift": -(arriving * slope).sum(others),
        "offset": arriving.sum(others),
        "slope": (arriving * shifted * (shifted <= 0)).sum(others),
    }
    np.testing.assert_allclose(found.detach().numpy(), slope * shifted + wide["offset"], atol=1e-5)
    assert given.grad is not None
    np.testing.assert_allclose(given.grad.numpy(), arriving * slope, atol=1e-5)
    for name, parameter in activation.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), wanted[name], atol=1e-4, err_msg=name)


def test_the_dtype_stays() -> None:
    assert RPReLU(3)(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_device_without_autocast() -> None:
    """As that on which a network's cost is counted."""
    with torch.device("meta"):
        assert RPReLU(3)(torch.zeros(2, 3, 4, 4)).shape == (2, 3, 4, 4)
