"""What each layer of a network in full precision loses with few bits: `tools.py --keyword sensitivity`.

Measured: one layer at a time is quantized, weight and input, with ranges of least squared error, and images are run.
Estimated to second order: Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", arXiv
1911.03852, section 3: half the mean eigenvalue of the Hessian of the loss times the squared error of the weight, where
the paper leaves out the half.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config.methods import EVEN
from utils.errors import UserError
from utils.report.sensitivity_record import FILE, Change, LayerSensitivity, Sensitivity, draw
from utils.text import printable
from utils.tools.options import Options, check_json_output, given_path, refuse_existing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model.layers.quantized import QuantLayer
    from model.load import Trained

    Batch = tuple[Tensor, Tensor]

BITS = (8, 4, 3, 2)
SAMPLES = 256  # images
BATCH = 128
PROBES = 16  # random vectors for the trace; its relative error falls with the square root of their number
HESSIAN_IMAGES = 128  # images of whose loss the Hessian is


def sensitivity(options: Options) -> int:
    """Measure what each layer of the full-precision checkpoint --old loses at few bits, one layer at a time."""
    check_json_output(options)
    from model.load import load_trained
    from utils.checkpoint import archive

    old = given_path(options.old)
    trained = load_trained(old, ema_weights=options.ema_weights)
    folder = trained.run_folder
    path = options.output or (None if folder is None else folder / FILE)
    if path is None:
        raise UserError(f"{old} lies in no run's folders: name the file to write with --output FILE.json")
    refuse_existing(options, path, path.with_suffix(".png"))
    batches = list(_sample(trained, options.root, options.samples or SAMPLES))
    record = measure(
        trained.network, batches, bits=options.bits or BITS, depthwise=trained.config.model.quant.depthwise,
        source=str(old),
    )  # fmt: skip
    print(record.as_text())
    archive.write_atomic(path, record.as_json().encode())
    draw(record, path.with_suffix(".png"))
    print(f"written: {printable(str(path))}, {printable(str(path.with_suffix('.png')))}")
    return 0


def _sample(trained: Trained, root: Path | None, samples: int) -> Iterator[Batch]:
    """The first training images in the order of the first epoch, of known classes; none is mixed with another."""
    import torch

    from model.load import data_of

    plain = dataclasses.replace(
        trained.config.data, batch_size=min(BATCH, samples), balanced=False, colour=False, rand_augment=None,
        mixup_alpha=0.0, cutmix_alpha=0.0,
    )  # fmt: skip
    config = dataclasses.replace(trained.config, data=plain)
    loader = data_of(dataclasses.replace(trained, config=config), root, train=True).train
    loader.set_epoch(0)
    for images, target in loader:
        yield images[:samples].to(torch.float32).contiguous(), target[:samples]
        samples -= len(images)
        if samples <= 0:
            return


def measure(
    network: nn.Module,
    batches: Sequence[Batch],
    *,
    bits: Sequence[int] = BITS,
    depthwise: bool = False,
    probes: int = PROBES,
    source: str = "",
) -> Sensitivity:
    """Quantize each layer alone, weight and input, and compare the loss with that in full precision.

    Args:
        network: in full precision, on the CPU; a copy is quantized.
        batches: images, float32 [N, C, H, W], and their classes, int64 [N]; ranges are found on the first one.
        bits: numbers of bits to try, 1 to 8.
        depthwise: quantize depth-wise convolutions too.
        probes: random vectors for the trace of the Hessian.
        source: of the network, for the record.

    Returns:
        The first and the last layer are among its layers.

    Raises:
        UserError: the network has quantizers, or no layer that can be quantized; or its loss is not finite.
    """
    from model.convert import below_zero, quantize
    from model.layers.quantized import quantizers
    from model.quant import QuantConfig, QuantizerConfig
    from model.selection import Selection
    from model.watch.cost import network_cost
    from utils.report.progress import progress

    images = batches[0][0]
    if any(True for _ in quantizers(network)):
        raise UserError(
            f"{source or 'the network'} is quantized: what its layers lose shows in full precision; name the "
            "checkpoint in full precision that its training started from (--pretrained)"
        )
    network = copy.deepcopy(network).eval()
    cost = network_cost(network, (images.shape[2], images.shape[3]), images.shape[1])
    signed = tuple(name for name, share in below_zero(network, images).items() if share > 0)
    loss, top1 = _evaluate(network, batches)
    if not math.isfinite(loss):
        raise UserError(f"{source or 'the network'}: its loss in full precision is not finite")
    levels = 2 ** max(bits)
    config = QuantConfig(
        fm=QuantizerConfig(tag="fm", enable=True, method=EVEN, levels=levels, half_range=True),
        wt=QuantizerConfig(tag="wt", enable=True, method=EVEN, levels=levels),
        first_last=True, depthwise=depthwise,
    )  # fmt: skip
    found = quantize(network, config, select=Selection(signed=signed), example=(images[:1],)).replaced
    for _, quantizer in quantizers(network):
        quantizer.enabled = False
    traces = hessian_traces(network, images[:HESSIAN_IMAGES], batches[0][1][:HESSIAN_IMAGES], found, probes)
    rows = [row for row in cost.layers if row.name in found]
    layers = []
    for row in progress(rows, len(rows), "layers", True):
        layer: QuantLayer = network.get_submodule(row.name)  # pyright: ignore[reportAssignmentType]
        entering = _input_of(network, layer, images)
        changes = {}
        for width in sorted(bits, reverse=True):
            error = _set_ranges(layer, entering, 2**width)
            measured = {}
            for parts in (("quant_weight",), ("quant_weight", "quant_activation")):
                for part, quantizer in layer.quantizers():
                    quantizer.enabled = part in parts
                measured[len(parts)] = _evaluate(network, batches)
            changes[width] = Change(
                loss=measured[2][0] - loss, weight_loss=measured[1][0] - loss, top1=measured[2][1] - top1,
                estimate=traces[row.name] * error / 2,
            )  # fmt: skip
        for _, quantizer in layer.quantizers():
            quantizer.enabled = False
        values = (traces[row.name], *(x for change in changes.values() for x in dataclasses.astuple(change)))
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"{source or 'the network'}: quantizing {row.name} alone, its loss or the trace of its Hessian is not "
                "finite: a norm or a weight of the network is damaged"
            )
        layers.append(
            LayerSensitivity(
                name=row.name,
                kind=row.kind,
                weights=row.weights,
                macs=row.macs,
                trace=traces[row.name],
                changes=changes,
            )
        )
    others = [row for row in cost.layers if row.name not in found]
    return Sensitivity(
        checkpoint=source, images=sum(len(part) for part, _ in batches), loss=loss, top1=top1, layers=tuple(layers),
        other_bytes=sum(4 * row.weights for row in others), other_macs=sum(row.macs for row in others),
    )  # fmt: skip


def _evaluate(network: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean cross-entropy, and top-1 in percent."""
    import torch
    from torch.nn import functional

    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for images, target in batches:
            logits = network(images)
            loss += float(functional.cross_entropy(logits, target, reduction="sum"))
            right += int((logits.argmax(1) == target).sum())
            count += len(target)
    return loss / count, 100 * right / count


def _input_of(network: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """The input of a layer in a pass of images."""
    from model.observe import first_input, observing

    found: list[Tensor] = []
    with observing(network) as hooks:
        hooks.append(
            layer.register_forward_pre_hook(
                lambda _, inputs, named: found.append(first_input(inputs, named)), with_kwargs=True
            )
        )
        network(images)
    return found[0]


def _set_ranges(layer: QuantLayer, entering: Tensor, levels: int) -> float:
    """Give the quantizers of a layer levels and ranges; returns the sum of the squared errors of its weight."""
    import torch

    from model.calibrate import initialise_range
    from model.quant import QuantConfig

    error = 0.0
    for part, quantizer in layer.quantizers():
        quantizer.set_levels(levels)
        x = layer.full_weight().detach() if part == "quant_weight" else entering
        initialise_range(quantizer, x, QuantConfig(re_init_range="mse"))
        if part == "quant_weight":
            with torch.no_grad():
                quantizer.enabled = True
                error = float((quantizer(x) - x).square().sum())
    return error


def hessian_traces(
    network: nn.Module, images: Tensor, target: Tensor, names: Sequence[str], probes: int = PROBES
) -> dict[str, float]:
    """The trace of the Hessian of the mean cross-entropy for each layer's weight, over the number of its weights.

    Hutchinson's estimate: the mean of v . Hv over random vectors v of signs. One product with the Hessian of all
    weights serves all layers, since signs of different layers are independent.

    Args:
        network: in full precision, in evaluation mode.
        images: float32 [N, C, H, W].
        target: int64 [N].
        names: of the layers.
        probes: number of vectors; drawn with the seed 0.
    """
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    weights = [network.get_submodule(name).get_parameter("weight").requires_grad_() for name in names]
    total = torch.zeros(len(names), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        with sdpa_kernel(SDPBackend.MATH):  # of the others torch knows no second derivative
            loss = functional.cross_entropy(network(images), target)
        gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        for _ in range(probes):
            signs = [torch.randint(0, 2, w.shape, generator=generator) * 2.0 - 1 for w in weights]
            along = sum((g * v).sum() for g, v in zip(gradients, signs, strict=True) if g.requires_grad)
            if not isinstance(along, torch.Tensor):  # the loss depends on no weight
                break
            products = torch.autograd.grad(along, weights, retain_graph=True, materialize_grads=True)
            total += torch.stack([(v * hv).sum().double() for v, hv in zip(signs, products, strict=True)])
    counts = torch.tensor([w.numel() for w in weights])
    return dict(zip(names, (total / probes / counts).tolist(), strict=True))
