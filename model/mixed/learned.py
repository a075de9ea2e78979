"""Bits of each layer learned by gradient descent under a budget: `tools.py --keyword learn-bits`.

Yang and Jin, "FracBits: Mixed Precision Quantization via Fractional Bit-Widths", arXiv 2007.02017: a layer has a
number of bits b that is no whole one; its weight and input are quantized with floor(b) and with floor(b) + 1 bits, and
what lies between the two is taken, so that b has a gradient. A penalty on the cost above the budget is added to the
loss. At the end all b are moved by the same amount and rounded down, so that the budget is just kept. What is trained
here beside the bits is thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from model.mixed.plan import given_budget, given_files, write
from utils.errors import UserError
from utils.report.sensitivity_record import Sensitivity
from utils.text import format_table, printable
from utils.tools.options import Options

EPOCHS = 10


def learn_bits(options: Options) -> int:
    """Learn the bits of each layer under a budget, from the network of a record of sensitivity, for --layer_bits."""
    new, record = given_files(options)
    ends = min(record.bits), max(record.bits)
    if ends[0] == ends[1]:
        raise UserError(
            f"{options.old} has one number of bits: measure more (sensitivity --bits 8,2 --force)"
        )
    budget, size, said = given_budget(options, record, ends)
    from model.load import load_trained
    from model.mixed.fractional import learn

    trained = load_trained(Path(record.checkpoint), ema_weights=options.ema_weights)
    epochs = options.epochs or EPOCHS
    learned = learn(trained, record, budget, size=size, ends=ends, epochs=epochs, root=options.root)
    bits = rounded(learned, record, budget, size=size, ends=ends)
    write(new, record, bits, said)
    rows = [
        (printable(layer.name), layer.kind, f"{layer.weights:,}", f"{layer.macs:,}",
         f"{learned[layer.name]:.2f}", str(bits[layer.name]))
        for layer in record.layers
    ]  # fmt: skip
    print(format_table(("layer", "kind", "weights", "MACs", "learned", "bits"), rows))
    operations = record.bit_operations_with(bits) / 1e6
    print(f"all layers: {record.bytes_with(bits) / 1024:.1f} KiB, {operations:.1f} million bit operations")
    print(f"written: {printable(str(new))}, for main.py --layer_bits {printable(str(new))}")
    return 0


def rounded(
    bits: Mapping[str, float], record: Sensitivity, budget: int, *, size: bool, ends: tuple[int, int]
) -> dict[str, int]:
    """Whole numbers within a budget: floor(b + t), with the largest t that keeps it.

    Args:
        bits: of each layer.
        record: what they cost.
        budget: bytes where `size`, else bit operations; at least the cost of the fewest bits everywhere.
        size: see `budget`.
        ends: the fewest and the most bits.
    """
    fewest, most = ends
    shifts = sorted((k - b for b in bits.values() for k in range(fewest, most + 1)), reverse=True)
    for shift in shifts:
        found = {name: max(fewest, min(most, int(b + shift + 1e-6))) for name, b in bits.items()}
        cost = record.bytes_with(found) if size else record.bit_operations_with(found)
        if cost <= budget:
            return found
    return dict.fromkeys(bits, fewest)
