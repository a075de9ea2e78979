"""The word verify of tools.py: whether exported files compute what the checkpoint computes, and how fast.

torch and engines are imported where they are used, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.deploy import formats
from model.deploy.coreml.folder import predicts
from model.deploy.packages import needed
from utils.checkpoint.exported import NETWORK, check_checkpoint, check_exported, exported_kind, kind_of
from utils.errors import UserError
from utils.report.verified import FILE, Comparison, Verified
from utils.text import printable
from utils.tools.options import Options, check_json_output, given_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model.deploy.code_shares import CodeShares
    from model.deploy.codes import Array
    from model.deploy.engines import Engine, Runner
    from model.deploy.graph import DeployGraph

ALLOWED = 0.2  # percentage points of top-1 between the checkpoint and a file
SAME = 0.999  # share of images with the same class, default beside basic optimisation
SAME_OF_SUMS = 0.99  # where sums have 8 bits, of which many lie near the middle between two levels
REPEATS = 15  # measured runs of one image, between those of the float network
WATCHED = 256  # images whose codes are compared


def verify(options: Options) -> int:
    """Compare exported files with the checkpoint --old on its validation set, in their engines; 1: they differ."""
    check_json_output(options)
    files = [file / NETWORK if exported_kind(file) == "web" else file for file in options.files or ()]
    for file in files:
        check_exported(file)
    check_checkpoint(given_path(options.old))
    from model.deploy.engines import engines_of

    engines = {file: engines_of(file) for file in files}
    unrun = [] if predicts() else [file for file in files if kind_of(file) == "coreml"]
    if unrun:
        needed("coremltools")
        engines = {file: engine for file, engine in engines.items() if file not in unrun}
    for option in ("output", "root", "threads"):
        if getattr(options, option) is not None and not engines:
            raise UserError(
                f"--{option} {getattr(options, option)}: predictions of Core ML need macOS, so that no image is "
                "computed here; leave it out, or add files of other formats"
            )
    for engine in {engine for several in engines.values() for engine in several}:
        engine.check_installed()
    from model.load import data_of, load_trained
    from utils.config.image_size import sides

    old = given_path(options.old)
    trained = load_trained(old, ema_weights=options.ema_weights)
    shape = (trained.transform.channels, *sides(trained.transform.size))
    differ = _compare_unrun(unrun, trained.network, shape)
    if not engines:
        return 1 if differ else 0
    loader = data_of(trained, options.root).val
    if loader is None:
        raise UserError(f"{old}: its data set has no validation images to compare with")
    found = compare(trained.network, shape, loader, engines, threads=options.threads or 1)
    record = Verified(checkpoint=str(old), cpu=cpu(), comparisons=tuple(found))
    print(record.as_text())
    for fault in record.faults:
        print(fault)
    folder = trained.run_folder
    path = options.output or (None if folder is None else folder / FILE)
    if path is not None:
        from utils.checkpoint import archive  # imports torch

        archive.write_atomic(path, record.as_json().encode())
        shown = "" if options.output else f", for tools.py --keyword report {printable(str(path.parent))}"
        print(f"written: {printable(str(path))}{shown}")
    return 1 if record.faults or differ else 0


def _compare_unrun(files: Sequence[Path], network: nn.Module, shape: Sequence[int]) -> bool:
    """Compare what files hold with the network where nothing runs them; prints lines, returns whether they differ."""
    if not files:
        return False
    from model.deploy.coreml.engine import compared
    from model.deploy.graph import deploy_graph

    graph, differ = deploy_graph(network, shape), False
    for file in files:
        line, faults = compared(file, graph)
        print(printable(line))
        for fault in faults:
            print(printable(f"{file}: {fault}"))
        differ = differ or bool(faults)
    return differ


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

    from model.deploy.code_shares import (
        CodeShares,
        faults_of_codes,
        faults_of_optimiser,
        has_integer_sums,
    )
    from model.deploy.engines import Engine
    from model.deploy.graph import deploy_graph
    from model.deploy.onnx_qdq import integer_layers
    from model.watch.cost import network_cost

    order = [(file, engine) for file, several in engines.items() for engine in several]
    runners = [engine.open(file) for file, engine in order]
    basic = [_place_of_basic(order, file, engine) for file, engine in order]
    shares = CodeShares(network, [engine.open(file, tensors=True) for file, engine in order], basic)
    images, target, wanted, found = _run(network, batches, runners, shares)
    bits = network_cost(network, (shape[1], shape[2]), shape[0]).bits
    reference = 100 * float((wanted.argmax(1) == target).mean())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        plain, floats = without_quantizers(network), dict[str, Path]()
        if any(engine.name != "torch" for _, engine in order):
            floats = _float_files(deploy_graph(plain, shape), set(map(kind_of, engines)), Path(folder))
        judged = Engine("openvino")  # by how many layers it could compute with integers
        graph = deploy_graph(network, shape) if any(engine == judged for _, engine in order) else None
        for i, ((file, engine), runner, logits) in enumerate(zip(order, runners, found, strict=True)):
            top1 = 100 * float((logits.argmax(1) == target).mean())
            faults, sums = [], has_integer_sums(file)
            image = 100 / len(target)  # one more or less may be a tie of two levels
            if abs(top1 - reference) > max(ALLOWED, 1.001 * image):
                faults.append(f"top-1 is {top1:.2f} %, and {reference:.2f} % in torch")
            if (place := basic[i]) is not None:
                # Where it has torch's classes, the engine without its optimiser is the one that differs.
                agreeing = max(
                    float((logits.argmax(1) == other.argmax(1)).mean()) for other in (found[place], wanted)
                )
                if agreeing < min(SAME_OF_SUMS if sums else SAME, 1 - 1.001 / len(target)):
                    faults.append(
                        f"its optimiser changes the class of {100 * (1 - agreeing):.1f} % of the images"
                    )
            codes, optimiser = shares.codes(i), shares.optimiser(i)
            faults += faults_of_codes(codes, shares.names, sums=sums)
            faults += faults_of_optimiser(optimiser)
            # A convolution is an integer one in onnxruntime only where a quantizer follows, which a float sum is not.
            if graph is not None and engine == judged:
                expected = integer_layers(graph, strided_points=file.suffix == ".xml")
                if (runner.integer or 0) < expected:
                    faults.append(
                        f"{runner.integer} layers are computed with integers, and {expected} could be: it is slow"
                    )
            if not np.isfinite(logits).all():
                faults.append("it computes NaN or infinity")
            if kind_of(file) == "packed" and not np.array_equal(logits, wanted, equal_nan=True):
                faults.append("its logits are not those of the checkpoint to the last bit")
            beside = floats.get(kind_of(file), floats.get("onnx")) if engine.name != "torch" else None
            own, other = _latency(file, engine, beside, plain, images[:1], threads)
            results.append(
                Comparison(
                    file=str(file), engine=str(engine), bits=bits, images=len(target), codes=codes,
                    optimiser=optimiser, logits=_relative(np.abs(logits - wanted).max(), np.abs(wanted).max()),
                    same=float((logits.argmax(1) == wanted.argmax(1)).mean()), top1=top1, reference=reference,
                    bytes=bytes_of(file), integer=runner.integer, layers=runner.layers, milliseconds=own,
                    float_milliseconds=other, threads=threads, faults=tuple(faults),
                )
            )  # fmt: skip
    return results


def _place_of_basic(order: Sequence[tuple[Path, Engine]], file: Path, engine: Engine) -> int | None:
    """Where the same file runs with the engine's least optimisation; None for that itself, and where there is none."""
    other = (file, dataclasses.replace(engine, optimised=False))
    return order.index(other) if engine.optimised and other in order else None


def _relative(difference: float, largest: float) -> float | None:
    """Their quotient; None where it is no number, for which JSON has no word."""
    import math

    return float(difference / largest) if largest > 0 and math.isfinite(difference / largest) else None


def _run(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], runners: list[Runner], shares: CodeShares
) -> tuple[Array, Array, Array, list[Array]]:
    """Run torch and all engines over all batches, and compare the codes of the first images.

    Returns:
        The images of the first batch; the classes of all; torch's logits, and each runner's.
    """
    import numpy as np
    import torch

    first = np.empty(0)
    targets: list[Array] = []
    wanted: list[Array] = []
    found: list[list[Array]] = [[] for _ in runners]
    seen = 0
    for batch, target in batches:
        images = np.ascontiguousarray(batch.numpy())
        with torch.no_grad():
            # Not the batch itself: another order in memory may give other roundings.
            wanted.append(network(torch.from_numpy(images)).float().numpy())
        targets.append(target.numpy())
        first = images if seen == 0 else first
        for runner, logits in zip(runners, found, strict=True):
            logits.append(_logits(runner, images, wanted[-1]))
        shares.update(images[: max(0, WATCHED - seen)])
        seen += len(images)
    return first, np.concatenate(targets), np.concatenate(wanted), [np.concatenate(parts) for parts in found]


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


def without_quantizers(network: nn.Module) -> nn.Module:
    """A copy of the network in full precision."""
    import copy

    from model.layers.quantized import quantizers

    plain = copy.deepcopy(network)
    for _, quantizer in quantizers(plain):
        quantizer.enabled = False
    return plain


def _float_files(graph: DeployGraph, kinds: set[str], folder: Path) -> dict[str, Path]:
    """The float network in the formats of these kinds that have engines of their own, and as ONNX for all others."""
    files = {
        kind: folder / f"float{formats.ENDINGS[kind]}"
        for kind in ("onnx", "c", "coreml", "executorch", "litert", "mnn")
    }
    files = {kind: path for kind, path in files.items() if kind in {"onnx", *kinds}}
    for kind, path in files.items():
        formats.GRAPH_FORMATS[kind](graph, path)
    return files


def _latency(
    file: Path, engine: Engine, float_file: Path | None, plain: nn.Module, image: Array, threads: int
) -> tuple[float, float]:
    """Median milliseconds of one image in a file and in the float network, measured in turn; in torch without its file.

    The file gets what its input takes: bytes, where it normalises them itself.
    """
    import numpy as np
    import torch

    from model.deploy.engines import Engine
    from model.deploy.torch_engine import TorchRunner

    if float_file is None:
        beside: Runner = TorchRunner(file, plain)
    else:
        other = engine if engine.name != "qonnx" else Engine("onnxruntime")
        beside = other.open(float_file, threads=threads)
    runners = (engine.open(file, threads=threads), beside)
    inputs = [runner.prepared(image) for runner in runners]
    times: list[list[float]] = [[], []]
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for repeat in range(REPEATS + 3):
            for runner, given, measured in zip(runners, inputs, times, strict=True):
                start = time.perf_counter()
                runner.run(given)
                if repeat >= 3:  # the first ones warm up
                    measured.append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(former)
    return float(np.median(times[0])), float(np.median(times[1]))


def bytes_of(file: Path) -> int:
    """Bytes of a file, and of OpenVINO's weights beside it; of all files in a folder."""
    if file.is_dir():
        return sum(path.stat().st_size for path in file.rglob("*") if path.is_file())
    beside = [file, *([file.with_suffix(".bin")] if file.suffix == ".xml" else [])]
    return sum(path.stat().st_size for path in beside)


def cpu() -> str:
    """The name of this machine's processor, with family and model where its maker numbers them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # The first of each word is that of the first core.
    said = {word.strip(): text.strip() for word, _, text in (line.partition(":") for line in reversed(lines))}
    name = said.get("model name", "unknown")
    numbers = [said.get(word) for word in ("cpu family", "model")]
    return name if None in numbers else f"{name} (family {numbers[0]}, model {numbers[1]})"
