"""The state of the global random generators, as part of a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from utils.errors import UserError


def random_state() -> dict[str, Any]:
    """The state of the global generators: `random`, NumPy, torch on the CPU and on every CUDA device.

    Only tensors, lists, numbers and text, so that it can be part of a checkpoint.
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": numpy_state["state"]["key"].tolist(),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set all generators to a `random_state()`; CUDA devices only as far as both sides have them.

    Raises UserError when `state` is not of that form.
    """
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        numpy_state = state["numpy"]
        key = np.array(numpy_state["key"], dtype=np.uint32)
        cached = (numpy_state["has_gauss"], numpy_state["gauss"])
        np.random.set_state(("MT19937", key, numpy_state["pos"], *cached))
        torch.set_rng_state(state["torch"])
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for device, cuda_state in enumerate(state["cuda"][:devices]):
            torch.cuda.set_rng_state(cuda_state, device)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(
            "the checkpoint's random state was not written by this program; leave out -r and --resume_file"
        ) from error


def seed_generators(seed: int) -> None:
    """Start the global random generators: `random`, NumPy's and torch's; a seed of up to 63 bits."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's limit
    torch.manual_seed(seed)
