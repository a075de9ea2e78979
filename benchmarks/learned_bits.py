"""Learns the bits of each layer by gradient descent under a budget of bytes, for the comparison of benchmarks/mixed.py.

    python benchmarks/learned_bits.py --record exp/digits-fp/sensitivity.json --bytes 34099 --seed 1 --new bits.yaml

The method of Yang and Jin, "FracBits", arXiv 2007.02017: a layer has a number of bits b that is no whole one; its
weight and input are quantized with floor(b) and with floor(b) + 1 bits, and what lies between the two is taken, so that
b has a gradient. A penalty on the bytes above the budget is added to the loss. At the end all b are moved by the same
amount and rounded down, so that the budget is just kept. The network starts in full precision, the record's own; what
is trained here beside the bits is thrown away, and the bits are trained by `--layer_bits` as those of a plan are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is no package

from model.calibrate import initialise_ranges  # noqa: E402
from model.convert import below_zero, quantize  # noqa: E402
from model.layers.quantized import QuantLayer  # noqa: E402
from model.load import data_of, load_trained  # noqa: E402
from model.quant import QuantConfig, QuantizerConfig  # noqa: E402
from model.quantizers.frame import Quantizer  # noqa: E402
from model.selection import Selection  # noqa: E402
from utils.checkpoint import archive  # noqa: E402
from utils.config.methods import EVEN  # noqa: E402
from utils.report import sensitivity_record  # noqa: E402
from utils.report.sensitivity_record import Sensitivity  # noqa: E402

FEWEST, MOST = 2, 8
START = 6.0  # bits of every layer at the beginning; ranges are those of least squared error at so many
EPOCHS, RATE, CLIP = 10, 0.05, 1.0  # as benchmarks/digits.py trains networks with quantizers
BIT_RATE = 0.02  # of Adam: steps that do not depend on how large a layer is
PENALTY = 5.0  # of bytes above the budget, over the budget


class Between(nn.Module):
    """A quantizer with a number of bits that is no whole one.

    Args:
        quantizer: its range is learned, and is the same for all numbers of bits.
        bits: scalar, from FEWEST to MOST; its gradient is <g, q(b + 1) - q(b)>.
    """

    def __init__(self, quantizer: Quantizer, bits: nn.Parameter) -> None:
        super().__init__()
        self.quantizer, self.bits = quantizer, bits

    def forward(self, x: Tensor) -> Tensor:
        """Float32 of any shape, between the values of two numbers of bits."""
        fewer = min(int(self.bits.detach()), MOST - 1)
        self.quantizer.set_levels(2**fewer)
        below = self.quantizer(x)
        self.quantizer.set_levels(2 ** (fewer + 1))
        return torch.lerp(below, self.quantizer(x), self.bits - fewer)


def rounded(bits: Mapping[str, float], record: Sensitivity, budget: int) -> dict[str, int]:
    """Whole numbers within a budget of bytes: floor(b + t), with the largest t that keeps it.

    Args:
        bits: of each layer.
        record: what they cost.
        budget: bytes; at least what FEWEST bits everywhere take.
    """
    steps = sorted((k - b for b in bits.values() for k in range(FEWEST, MOST + 1)), reverse=True)
    for t in steps:
        found = {name: max(FEWEST, min(MOST, int(b + t + 1e-6))) for name, b in bits.items()}
        if record.bytes_with(found) <= budget:
            return found
    raise SystemExit(f"--bytes {budget}: {FEWEST} bits everywhere take {record.bytes_with(found)}")


def entries(bits: Mapping[str, int]) -> str:
    """The text of a file for --layer_bits."""
    found = [{"name": name, "wt_bit": number, "fm_bit": number} for name, number in bits.items()]
    return yaml.safe_dump(found, sort_keys=False)


def learn(record: Sensitivity, budget: int, seed: int) -> dict[str, float]:
    """The bits of each layer of a record, learned with the weights of its network."""
    trained = load_trained(Path(record.checkpoint))
    network, config = trained.network, trained.config
    torch.manual_seed(seed)
    loader = data_of(trained, train=True).train
    loader.set_epoch(0)
    images = next(iter(loader))[0].float()
    levels = 2 ** int(START)
    fm = QuantizerConfig(tag="fm", enable=True, method=EVEN, levels=levels, half_range=True)
    wt = QuantizerConfig(tag="wt", enable=True, method=EVEN, levels=levels)
    quant = QuantConfig(
        fm=fm, wt=wt, first_last=True, depthwise=config.model.quant.depthwise, re_init_range="mse"
    )
    signed = tuple(name for name, share in below_zero(network, images).items() if share > 0)
    quantize(network, quant, select=Selection(signed=signed), example=(images[:1],))
    initialise_ranges(network, images, quant)
    bits = {layer.name: nn.Parameter(torch.tensor(START)) for layer in record.layers}
    for name, parameter in bits.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        for part, quantizer in list(layer.quantizers()):
            setattr(layer, part, Between(quantizer, parameter))
    own = {id(parameter) for parameter in bits.values()}
    others = [p for p in network.parameters() if id(p) not in own]
    optimizer = torch.optim.SGD(others, RATE, momentum=0.9, weight_decay=1e-4, nesterov=True)
    bit_optimizer = torch.optim.Adam(bits.values(), BIT_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    fixed = record.bytes_with(dict.fromkeys(bits, 0))
    counts = {layer.name: layer.weights for layer in record.layers}
    network.train()
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for images, target in loader:
            size = fixed + torch.stack([counts[name] * b for name, b in bits.items()]).sum() / 8
            loss = functional.cross_entropy(network(images.float()), target, label_smoothing=0.1)
            loss = loss + PENALTY * functional.relu(size / budget - 1)
            optimizer.zero_grad()
            bit_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(others, CLIP)
            optimizer.step()
            bit_optimizer.step()
            with torch.no_grad():
                for parameter in bits.values():
                    parameter.clamp_(FEWEST, MOST)
        schedule.step()
        print(
            f"epoch {epoch + 1} of {EPOCHS}: loss {float(loss):.3f}, {float(size) / 1024:.1f} KiB", flush=True
        )
    return {name: float(parameter.detach()) for name, parameter in bits.items()}


def main() -> int:
    """Learn, round, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--record", type=Path, required=True, help="what tools.py --keyword sensitivity wrote"
    )
    parser.add_argument("--bytes", type=int, required=True, help="of all weights")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--new", type=Path, required=True, help="the file for --layer_bits")
    options = parser.parse_args()
    record = sensitivity_record.read(options.record)
    learned = learn(record, options.bytes, options.seed)
    found = rounded(learned, record, options.bytes)
    for name, bits in found.items():
        print(f"{name}: {learned[name]:.2f} -> {bits}")
    archive.write_atomic(options.new, entries(found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
