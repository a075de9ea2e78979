"""The packed format: a network in a safetensors file, its quantized weights as a stream of bits (docs/deploy.md)."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.deploy.bits import bit_stream, from_bit_stream
from model.layers.quantized import quantized_weights
from model.load import Trained
from model.pretrained import FIXED, stored_of
from model.quantizers.integers import QuantizedTensor
from utils.checkpoint import archive
from utils.checkpoint.exported import KEY, exported_kind
from utils.config.recorded import from_dict, to_dict
from utils.data.transform import ImageTransform
from utils.errors import UserError

VERSION = 1
TERNARY = 5  # digits to base 3 in a byte
_TENSORS = ("codebook", "factor", "scale", "offset", "rows", "deviation", "mean", "gamma")


def bits_of(levels: int) -> int:
    """Bits of a number below `levels`."""
    return max(1, (levels - 1).bit_length())


def pack(numbers: np.ndarray, levels: int) -> np.ndarray:
    """Numbers below `levels`, uint16 [n], as bytes: the lowest bit first, or five to base 3 a byte.

    Example:
        >>> import numpy as np
        >>> from model.deploy.packed import pack, unpack
        >>> pack(np.array([1, 2, 3, 0, 1], np.uint16), 4), pack(np.array([1, 2, 0, 1, 2], np.uint16), 3)
        (array([57,  1], dtype=uint8), array([196], dtype=uint8))
        >>> unpack(pack(np.array([1, 2, 3, 0, 1], np.uint16), 4), 5, 4)
        array([1, 2, 3, 0, 1], dtype=uint16)
    """
    if levels == 3:
        padded = np.zeros(-(-len(numbers) // TERNARY) * TERNARY, np.uint8)
        padded[: len(numbers)] = numbers
        return (padded.reshape(-1, TERNARY) * 3 ** np.arange(TERNARY, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return bit_stream(numbers, bits_of(levels))


def unpack(stream: np.ndarray, count: int, levels: int) -> np.ndarray:
    """The `count` numbers that `pack` has packed, uint16 [count]."""
    if levels == 3:
        digits = stream[:, None] // 3 ** np.arange(TERNARY, dtype=np.uint8) % 3
        return digits.reshape(-1)[:count].astype(np.uint16)
    return from_bit_stream(stream, bits_of(levels), count)


def write(trained: Trained, path: Path) -> None:
    """Write a network in the packed format.

    Raises:
        UserError: the quantizer of a weight gives no integers.
    """
    from safetensors.torch import save

    state = {name: value.detach() for name, value in trained.network.state_dict().items()}
    quantized: dict[str, Any] = {}
    for name, layer, quantizer in quantized_weights(trained.network):
        if not bool(quantizer.warmed_up()):
            continue  # such a weight is not quantized yet, and stays float
        full = layer.full_weight().detach()
        try:
            found = quantizer.integers(full)
        except NotImplementedError as error:
            raise UserError(
                f"{name}: {quantizer.config.method} has no encode, which gives the integers of a weight; write it, or "
                "export --to program"
            ) from error
        with torch.no_grad():
            if not torch.equal(found.dequantize(), quantizer(full)):
                raise UserError(
                    f"{name}: the integers of {quantizer.config.method} are not the weight that it trains: mend its "
                    "encode"
                )
        weight = layer.weight_entry(name)
        for entry in [
            entry for entry in state if entry == weight or entry.startswith(f"{name}.quant_weight.")
        ]:
            del state[entry]
        numbers = found.numbers.cpu().numpy().astype(np.uint16).reshape(-1)
        state[f"{weight}.numbers"] = torch.from_numpy(pack(numbers, quantizer.levels))
        for part in _TENSORS:
            value = getattr(found, part)
            if value is not None:
                state[f"{weight}.{part}"] = value.detach().to(
                    torch.int32 if part == "rows" else torch.float32
                )
        quantized[weight] = {
            "shape": list(layer.weight.shape),
            "levels": quantizer.levels,
            "first_code": _first_code(found)[0],
            "code_step": _first_code(found)[1],
            "zero_point": found.zero_point,
            "layer": name,
            **_uneven_codes(found),
        }
    content = {
        "format": VERSION,
        "config": to_dict(trained.config),
        "classes": list(trained.classes),
        "images": trained.transform.to_dict(),
        "quantized": quantized,
    }
    tensors = {name: value.cpu().contiguous().clone() for name, value in state.items()}
    text = json.dumps(content, allow_nan=False)
    # Not save_file, whose files only their owner can read.
    path.write_bytes(save(tensors, metadata={KEY: text, "sha256": _digest(text, tensors)}))


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The digest of all that a file holds: safetensors itself would not notice a changed byte."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_code(found: QuantizedTensor) -> tuple[int, int]:
    """The code of the lowest level, and the distance of the codes of neighbouring levels."""
    numbers, codes = found.numbers.flatten(), found.codes.flatten().long()
    low, high = int(numbers.argmin()), int(numbers.argmax())
    between = int(numbers[high] - numbers[low])
    step = int(codes[high] - codes[low]) // between if between else 1
    return int(codes[low] - step * numbers[low]), step


def _uneven_codes(found: QuantizedTensor) -> dict[str, list[int]]:
    """The codes of all levels where these are integers at uneven distances."""
    if found.scale is None:
        return {}
    codes = [code + found.zero_point for code in found.whole]
    return {"codes": codes} if len({b - a for a, b in itertools.pairwise(codes)}) > 1 else {}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint that a packed file becomes again: its weights have the quantized values alone.

    Raises:
        UserError: it is no such file, or damaged.
    """
    content, tensors = _read(path)
    broken = UserError(f"{path}: damaged or cut short; copy it again or export the network again")
    fixed: dict[str, dict[str, Any]] = {}
    try:
        for weight, one in content["quantized"].items():
            shape, levels = [int(side) for side in one["shape"]], int(one["levels"])
            count = int(np.prod(shape))
            numbers = unpack(tensors.pop(f"{weight}.numbers").numpy(), count, levels)
            if len(numbers) != count or numbers.max(initial=0) >= levels:
                raise broken
            parts = {
                part: tensors.pop(f"{weight}.{part}") for part in _TENSORS if f"{weight}.{part}" in tensors
            }
            entry = {
                "numbers": torch.from_numpy(numbers.astype(np.int32).reshape(shape)),
                "first_code": int(one["first_code"]),
                "code_step": int(one["code_step"]),
                "zero_point": int(one["zero_point"]),
                **({"codes": [int(code) for code in one["codes"]]} if "codes" in one else {}),
                **parts,
            }
            layer = one.get(
                "layer", weight.removesuffix(".weight")
            )  # files of earlier versions do not say it
            fixed[layer] = entry
            tensors[weight] = stored_of(entry).dequantize()
            quantizer = f"{layer}.quant_weight"
            tensors[f"{quantizer}.level_num"] = torch.tensor([levels])
            tensors[f"{quantizer}.iteration"] = torch.tensor([0])
        config = from_dict(content["config"], str(path))
        images = ImageTransform.from_dict(content["images"], str(path))
        classes = [str(name) for name in content["classes"]]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise broken from error
    return {
        "state_dict": tensors,
        "config": to_dict(config),
        "classes": classes,
        "max_value": images.max_value,
        "images": images.to_dict(),
        FIXED: fixed,
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a packed file."""
    from safetensors import SafetensorError, safe_open

    foreign = UserError(f"{path}: is no packed network; name a file that export --to packed has written")
    if path.is_dir() or exported_kind(path) not in ("", "packed"):
        raise foreign
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise foreign
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        if metadata.get("sha256") != _digest(metadata[KEY], tensors):
            raise ValueError("another digest")
        content = json.loads(metadata[KEY])
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{path}: damaged, cut short or no packed network; copy it again or export the network again"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({archive.reason_of(error)}); check the path") from error
    if not isinstance(content, dict) or content.get("format") != VERSION:
        raise UserError(f"{path}: is of another version of the packed format than {VERSION}; export it again")
    return content, tensors
