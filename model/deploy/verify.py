"""The word verify of tools.py: whether exported files compute what the checkpoint computes, and how fast.

torch and engines are imported where they are used, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.text import format_table, printable
from utils.tools.options import Options, given_path, refuse_existing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model.deploy.codes import Array
    from model.deploy.engines import Engine, Runner

ALLOWED = 0.2  # percentage points of top-1 between the checkpoint and a file
SAME = 0.999  # share of images with the same class, default beside basic optimisation
TIES = 0.01  # share of the codes of a layer that rounding may change
APART = 1e-3  # of a tensor's largest value: levels that are farther apart are different ones
REPEATS = 15  # measured runs of one image, between those of the float network
WATCHED = 256  # images whose codes are compared


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A file in an engine beside the checkpoint in torch.

    Attributes:
        file: the exported file.
        engine: the engine and its optimisation.
        bits: of weights and of activations, as in the training's summary.
        images: how many were compared.
        codes: share of different codes of each quantizer, by its name, in the order of the network.
        logits: largest difference of a logit, over the largest logit; None where there is none.
        same: share of images with the same most probable class.
        top1: percent; `reference` is that of the checkpoint.
        bytes: of the file and those beside it.
        integer: convolutions and linear layers that compute with integers, of `layers`; None: the engine does not say.
        milliseconds: median of one image with `threads` threads; `float_milliseconds` of the float network in between.
        faults: what is wrong; empty where all is well.
    """

    file: str
    engine: str
    bits: str
    images: int
    codes: dict[str, float]
    logits: float | None
    same: float
    top1: float
    reference: float
    bytes: int
    integer: int | None
    layers: int
    milliseconds: float
    float_milliseconds: float
    threads: int
    faults: tuple[str, ...] = ()


def verify(options: Options) -> int:
    """Compare exported files with the checkpoint --old on its validation set, in their engines; 1: they differ."""
    files = options.files or ()
    if options.output is not None:
        if options.output.suffix != ".json" or not options.output.parent.is_dir():
            raise UserError(f"--output {options.output}: name a .json file in a folder that exists")
        refuse_existing(options, options.output)
    from model.deploy.engines import engines_of

    engines = {file: engines_of(file) for file in files}
    from model.load import data_of, load_trained
    from utils.config.image_size import sides

    trained = load_trained(given_path(options.old), ema_weights=options.ema_weights)
    loader = data_of(trained, options.root).val
    if loader is None:
        raise UserError(f"{options.old}: its data set has no validation images to compare with")
    shape = (trained.transform.channels, *sides(trained.transform.size))
    found = compare(trained.network, shape, loader, engines, threads=options.workers or 1)
    print(as_text(found))
    if options.output is not None:
        from utils.checkpoint import archive  # imports torch

        report = {"cpu": cpu(), "comparisons": [asdict(item) for item in found]}
        archive.write_atomic(options.output, json.dumps(report, indent=1, allow_nan=False).encode())
    faults = [f"{item.file} ({item.engine}): {fault}" for item in found for fault in item.faults]
    for fault in faults:
        print(printable(fault))
    return 1 if faults else 0


def compare(
    network: nn.Module,
    shape: Sequence[int],
    batches: Iterable[tuple[Tensor, Tensor]],
    engines: dict[Path, list[Engine]],
    *,
    threads: int = 1,
) -> list[Comparison]:
    """Each file in each of its engines beside the network in torch.

    Args:
        network: in evaluation mode, on the CPU.
        shape: channels, height and width of an image.
        batches: images, float32 [N, channels, height, width], and their classes, int64 [N].
        engines: the engines of each file.
        threads: of the measured runs.

    Raises:
        UserError: an engine is not installed or does not take its file.
    """
    import tempfile

    import numpy as np

    from model.deploy.engines import Engine
    from model.deploy.graph import deploy_graph
    from model.deploy.onnx_qdq import integer_layers
    from model.watch.cost import network_cost

    order = [(file, engine) for file, several in engines.items() for engine in several]
    runners = [engine.open(file) for file, engine in order]
    watched = [engine.open(file, tensors=True) for file, engine in order]
    images, target, wanted, found, names, differing = _run(network, batches, runners, watched)
    bits = network_cost(network, (shape[1], shape[2]), shape[0]).bits
    reference = 100 * float((wanted.argmax(1) == target).mean())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        _write_float(network, shape, plain)
        graph = deploy_graph(network, shape)
        for (file, engine), runner, logits, codes in zip(order, runners, found, differing, strict=True):
            top1 = 100 * float((logits.argmax(1) == target).mean())
            faults = []
            image = 100 / len(target)  # one more or less may be a tie of two levels
            if abs(top1 - reference) > max(ALLOWED, 1.001 * image):
                faults.append(f"top-1 is {top1:.2f} %, and {reference:.2f} % in torch")
            basic = (file, dataclasses.replace(engine, optimised=False))
            if engine.optimised and basic in order:
                agreeing = float((logits.argmax(1) == found[order.index(basic)].argmax(1)).mean())
                if agreeing < min(SAME, 1 - 1.001 / len(target)):
                    faults.append(
                        f"its optimiser changes the class of {100 * (1 - agreeing):.1f} % of the images"
                    )
            faults += _faults_of_codes(codes, names)
            # A convolution is an integer one in onnxruntime only where a quantizer follows, which a float sum is not.
            expected = integer_layers(graph, strided_points=file.suffix == ".xml")
            if engine == Engine("openvino") and (runner.integer or 0) < expected:
                faults.append(
                    f"{runner.integer} layers are computed with integers, and {expected} could be: it is slow"
                )
            if not np.isfinite(logits).all():
                faults.append("it computes NaN or infinity")
            own, other = _latency(file, plain, engine, images[:1], threads)
            results.append(
                Comparison(
                    file=str(file), engine=str(engine), bits=bits, images=len(target), codes=codes,
                    logits=_relative(np.abs(logits - wanted).max(), np.abs(wanted).max()),
                    same=float((logits.argmax(1) == wanted.argmax(1)).mean()), top1=top1, reference=reference,
                    bytes=bytes_of(file), integer=runner.integer, layers=runner.layers, milliseconds=own,
                    float_milliseconds=other, threads=threads, faults=tuple(faults),
                )
            )  # fmt: skip
    return results


def _faults_of_codes(codes: dict[str, float], names: Sequence[str]) -> list[str]:
    """What is wrong with the codes of a file, in the order of the network's quantizers `names`.

    Codes that are others disturb the sums behind them like noise, whose deviation grows with the square root of their
    share: it limits the shares of later layers.
    """
    faults, largest = [], 0.0
    for name in names:
        if name not in codes:
            faults.append(f"it has no {name}, a quantizer of the checkpoint")
        elif codes[name] > max(TIES, largest**0.5):
            before = f"at most {100 * largest:.3f} % of a layer's before it" if largest else "none before it"
            faults.append(f"{100 * codes[name]:.1f} % of the codes of {name} are others, and {before}")
        largest = max(largest, codes.get(name, 0.0))
    return faults


def _relative(difference: float, largest: float) -> float | None:
    """Their quotient; None where it is no number, for which JSON has no word."""
    import math

    return float(difference / largest) if largest > 0 and math.isfinite(difference / largest) else None


def _run(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], runners: list[Runner], watched: list[Runner]
) -> tuple[Array, Array, Array, list[Array], list[str], list[dict[str, float]]]:
    """Run torch and all engines over all batches.

    Returns:
        The images of the first batch; the classes of all; torch's logits, and each runner's; the names of the
        quantizers in the order of the network; and each runner's shares of different codes in the first batches, by
        these names.
    """
    from functools import partial

    import numpy as np
    import torch

    from model.layers.quantized import quantizers

    values: dict[str, Array] = {}

    def keep(name: str, _module: nn.Module, _input: tuple[Tensor, ...], output: Tensor) -> None:
        values[name] = output.float().numpy()

    hooks = [
        module.register_forward_hook(partial(keep, name))
        for name, module in quantizers(network)
        if module.config.tag != "wt" and module.enabled
    ]
    first = np.empty(0)
    targets: list[Array] = []
    wanted: list[Array] = []
    found: list[list[Array]] = [[] for _ in runners]
    apart: list[dict[str, list[float]]] = [{} for _ in runners]
    seen = 0
    try:
        with torch.no_grad():
            for batch, target in batches:
                wanted.append(network(batch).float().numpy())
                targets.append(target.numpy())
                images = np.ascontiguousarray(batch.numpy())
                first = images if seen == 0 else first
                for runner, watching, logits, shares in zip(runners, watched, found, apart, strict=True):
                    logits.append(_logits(runner, images, wanted[-1]))
                    if seen >= WATCHED:
                        continue
                    tensors = watching(images[: WATCHED - seen])
                    for name in set(watching.tensors) & set(values):
                        shares.setdefault(name, []).append(_apart(tensors[name], values[name]))
                seen += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    means = [{name: float(np.mean(shares[name])) for name in values if name in shares} for shares in apart]
    return (
        first,
        np.concatenate(targets),
        np.concatenate(wanted),
        [np.concatenate(parts) for parts in found],
        list(values),
        means,
    )


def _logits(runner: Runner, images: Array, wanted: Array) -> Array:
    """The logits of a file, or a `UserError` where it is of another network."""
    from model.deploy.engines import reason

    try:
        found = runner(images)["logits"]
    except UserError:
        raise
    except Exception as error:  # each engine has exceptions of its own
        raise UserError(f"{runner.path} does not run on the checkpoint's images: {reason(error)}") from error
    if found.shape != wanted.shape:
        raise UserError(
            f"{runner.path} gives {'x'.join(map(str, found.shape))} logits where the checkpoint gives "
            f"{'x'.join(map(str, wanted.shape))}; name files that were exported from --old"
        )
    return found


def _apart(value: Array, wanted: Array) -> float:
    """The share of values that are other levels."""
    import numpy as np

    wanted = wanted[: len(value)]
    return float((np.abs(value - wanted) > APART * np.abs(wanted).max()).mean())


def _write_float(network: nn.Module, shape: Sequence[int], path: Path) -> None:
    """The network without its quantizers, as an ONNX file."""
    import copy

    import onnx

    from model.deploy.graph import deploy_graph
    from model.deploy.onnx_qdq import qdq_model
    from model.layers.quantized import quantizers

    plain = copy.deepcopy(network)
    for _, quantizer in quantizers(plain):
        quantizer.enabled = False
    onnx.save(qdq_model(deploy_graph(plain, shape)), path)


def _latency(file: Path, plain: Path, engine: Engine, image: Array, threads: int) -> tuple[float, float]:
    """Median milliseconds of one image in a file and in the float network, measured in turn.

    The file gets what its input takes: bytes, where it normalises them itself.
    """
    import numpy as np

    from model.deploy.engines import Engine

    beside = engine if engine.name != "qonnx" else Engine("onnxruntime")
    runners = (engine.open(file, threads=threads), beside.open(plain, threads=threads))
    inputs = [runner.prepared(image) for runner in runners]
    times: list[list[float]] = [[], []]
    for repeat in range(REPEATS + 3):
        for runner, given, measured in zip(runners, inputs, times, strict=True):
            start = time.perf_counter()
            runner.run(given)
            if repeat >= 3:  # the first ones warm up
                measured.append(1000 * (time.perf_counter() - start))
    return float(np.median(times[0])), float(np.median(times[1]))


def bytes_of(file: Path) -> int:
    """Bytes of a file, and of OpenVINO's weights beside it."""
    beside = [file, *([file.with_suffix(".bin")] if file.suffix == ".xml" else [])]
    return sum(path.stat().st_size for path in beside)


def cpu() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def as_text(found: Sequence[Comparison]) -> str:
    """The comparisons as a table, and the processor."""
    head = ("file", "engine", "bits w/a", "codes", "logits", "same", "top-1", "KiB", "integer", "ms", "float")
    rows: list[tuple[Any, ...]] = []
    for item in found:
        worst = f"{100 * max(item.codes.values()):.3f} %" if item.codes else "-"
        rows.append(
            (
                printable(Path(item.file).name),
                item.engine,
                item.bits,
                worst,
                "-" if item.logits is None else f"{item.logits:.1e}",
                f"{100 * item.same:.2f} %",
                f"{item.top1:.2f}",
                f"{item.bytes / 1024:.1f}",
                f"{'?' if item.integer is None else item.integer} of {item.layers}",
                f"{item.milliseconds:.2f}",
                f"{item.float_milliseconds:.2f}",
            )
        )
    reference, threads = found[0].reference, found[0].threads
    return (
        f"{format_table(head, rows)}\n"
        f"torch: top-1 {reference:.2f} on {found[0].images} images; codes: the largest share of different ones in a "
        f"layer; ms and float: median of one image, {threads} thread{'s' * (threads != 1)}, {cpu()}"
    )
