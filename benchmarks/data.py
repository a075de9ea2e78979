"""Measures how fast the data sets are, against decoding alone, and how long training waits for them.

    python benchmarks/data.py                    # everything, on generated photographs of 500x375 pixels
    python benchmarks/data.py --root FOLDER      # on the training images of a folder of yours

Every round measures each way once, one after the other, so that other load on the machine affects all of them
alike; a ratio is of two figures of the same round, and the median over the rounds is printed. The limit of
`imagenet` is processes that only read and decode whole files with Pillow; that of `dali` is threads of DALI that do
the same. A further column has the share of the limit that remains when the images are resized too: `imagenet` decodes
whole files and `dali` random crops, and the results are thrown away.

The table of CPU time is of one process, `imagenet` without workers and `dali` with one thread of each kind. It
shows where the time goes, and depends little on other load.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.nn import functional
from torchvision.models import resnet18

from utils.config.image_size import sides
from utils.config.schema import DataConfig
from utils.data import sources
from utils.data.augment import crop_flip
from utils.data.crop import crop_and_flip, resize
from utils.data.fake import write_folder
from utils.data.image_file import decode
from utils.data.image_folder import ImageNames
from utils.data.loader import Delivery, Loader
from utils.data.tensor_loader import TensorLoader
from utils.errors import UserError
from utils.step.meters import Waiting
from utils.text import format_table

Clock = Callable[[], float]


def seconds_of(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """The seconds of running `work` once."""
    started = clock()
    work()
    return clock() - started


def epoch(loader: Loader, device: torch.device) -> None:
    """Only take all batches of an epoch."""
    for _ in loader:
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode_files(size: tuple[int, int] | None, paths: Sequence[str]) -> None:
    """Read and decode whole files with Pillow, and resize random crops of them if there is a size."""
    for index, path in enumerate(paths):
        with open(path, "rb") as file:
            image = decode(file.read())
        if size is not None:
            (top, left, height, width), _ = crop_and_flip(image.height, image.width, size, 0, 0, index)
            crop = image.crop((left, top, left + width, top + height))
            resize(torch.from_numpy(np.array(crop)), *size)


def dali_decoder(
    paths: Sequence[str], threads: int, batch_size: int, size: tuple[int, int] | None, device: torch.device
) -> Callable[[], None]:
    """A pipeline of DALI that reads and decodes whole files, or with a size random crops that are resized.

    Returns a function that runs it once over all files.
    """
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    gpu = device.type == "cuda"
    pipeline = Pipeline(batch_size, threads, device.index or 0 if gpu else None)
    with pipeline:
        encoded, _ = fn.readers.file(files=list(paths))
        how = {"device": "mixed" if gpu else "cpu", "output_type": types.DALIImageType.RGB}
        if size is None:
            image = fn.decoders.image(encoded, **how)
        else:
            image = fn.decoders.image_random_crop(encoded, random_aspect_ratio=(3 / 4, 4 / 3), **how)
            image = fn.resize(image, size=size) if gpu else image
        pipeline.set_outputs(image)
    pipeline.build()
    resizers = ThreadPoolExecutor(threads)

    def run() -> None:
        for _ in range(len(paths) // batch_size):
            (output,) = pipeline.run()
            if size is not None and not gpu:
                crops = [torch.from_dlpack(output[i]) for i in range(batch_size)]
                list(resizers.map(partial(resize, height=size[0], width=size[1]), crops))

    return run


def measure_speed(
    config: DataConfig, device: torch.device, rounds: int, dali: bool, clock: Clock
) -> tuple[dict[tuple[str, str], list[float]], int]:
    """Seconds of each data set's ways, "loader", "decode" and "resize", per round; the images of one round."""
    assert config.root is not None
    names = ImageNames(config.root / "train")
    count = len(names) // config.batch_size * config.batch_size
    paths = [names.path(index) for index in range(count)]
    workers = config.workers
    shares = [paths[rank::workers] for rank in range(workers)]
    context = multiprocessing.get_context("forkserver")
    sizes = {"decode": None, "resize": sides(config.input_size)}
    with ProcessPoolExecutor(max(1, workers), mp_context=context) as pool:
        ways: dict[tuple[str, str], Callable[[], object]] = {}
        for dataset in ("imagenet", "dali") if dali else ("imagenet",):
            loader = sources.open_data(replace(config, dataset=dataset), device).train
            ways[dataset, "loader"] = partial(epoch, loader, device)
            for name, size in sizes.items():
                if dataset == "dali":
                    way = dali_decoder(paths, max(1, workers), config.batch_size, size, device)
                elif workers:
                    way = partial(decode_in_pool, pool, size, shares)
                else:
                    way = partial(decode_files, size, paths)
                ways[dataset, name] = way
        for way in ways.values():
            way()  # starts processes and threads
        taken: dict[tuple[str, str], list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                taken[name].append(seconds_of(way, clock))
    return taken, count


def decode_in_pool(pool: Executor, size: tuple[int, int] | None, shares: Sequence[Sequence[str]]) -> None:
    """Let each process of a pool decode its share of the files."""
    list(pool.map(partial(decode_files, size), shares))


def ratio(limit: Sequence[float], taken: Sequence[float]) -> str:
    """The median over the rounds of the limit's time divided by this time."""
    return f"{statistics.median(a / b for a, b in zip(limit, taken, strict=True)):.2f}"


def speed_rows(config: DataConfig, device: torch.device, rounds: int, dali: bool) -> list[tuple[str, ...]]:
    """Images per second of the data sets with a number of workers, and their share of the limit."""
    taken, count = measure_speed(config, device, rounds, dali, time.perf_counter)
    rows = []
    for name in dict.fromkeys(dataset for dataset, _ in taken):
        loader, alone, resized = (taken[name, way] for way in ("loader", "decode", "resize"))
        speeds = (f"{count / statistics.median(times):.0f}" for times in (loader, alone))
        rows.append((name, str(config.workers), *speeds, ratio(alone, loader), ratio(alone, resized)))
    if dali:
        quotient = ratio(taken["imagenet", "loader"], taken["dali", "loader"])
        rows.append(("dali / imagenet", str(config.workers), "", "", quotient, ""))
    return rows


def cpu_rows(config: DataConfig, device: torch.device, rounds: int, dali: bool) -> list[tuple[str, ...]]:
    """CPU milliseconds per image of one process."""
    taken, count = measure_speed(replace(config, workers=0), device, rounds, dali, time.process_time)
    rows = []
    for name in dict.fromkeys(dataset for dataset, _ in taken):
        loader, alone, resized = (taken[name, way] for way in ("loader", "decode", "resize"))
        costs = (f"{1000 * statistics.median(times) / count:.2f}" for times in (alone, resized, loader))
        rows.append((name, *costs, ratio(alone, loader), ratio(alone, resized)))
    return rows


def share_waited(config: DataConfig, device: torch.device, steps: int) -> tuple[float, float]:
    """Percent of the time of ResNet-18's training steps that is spent waiting for data; images per second."""
    loader = sources.open_data(config, device).train
    network = resnet18(num_classes=config.num_classes).to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    waiting, started = Waiting(loader), 0.0
    for step, (images, target) in enumerate(waiting):
        functional.cross_entropy(network(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:  # the workers have started
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            waiting.seconds, started = 0.0, time.perf_counter()
        if step == steps:
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    total = time.perf_counter() - started
    return 100 * waiting.seconds / total, steps * config.batch_size / total


def small_sets(device: torch.device, rounds: int) -> list[tuple[str, str]]:
    """Seconds of an epoch of the sets that are in memory; random pixels stand for CIFAR-10's."""
    pixels = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    delivery = Delivery(batch_size=128, train=True, seed=0, mean=(0.5,) * 3, std=(0.2,) * 3, device=device)
    cifar = TensorLoader(pixels, torch.zeros(50_000).long(), delivery, size=32, augment=crop_flip)
    loaders: dict[str, Loader] = {"cifar10, 50,000 images": cifar}
    for name, classes in (("digits", 10), ("glyphs", 62)):
        loader = sources.open_data(DataConfig(dataset=name, num_classes=classes), device).train
        loaders[f"{name}, {loader.samples:,} images"] = loader
    rows = []
    for name, loader in loaders.items():
        epoch(loader, device)
        taken = [seconds_of(lambda loader=loader: epoch(loader, device)) for _ in range(rounds)]
        rows.append((name, f"{statistics.median(taken):.2f}"))
    return rows


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of measurements on photographs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="folder with train/ and val/; default: one that is made")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker counts [1 2]")
    parser.add_argument("--images", type=int, default=512, help="training images that are made [512]")
    parser.add_argument("--rounds", type=int, default=7, help="rounds [7]")
    parser.add_argument("-b", "--batch_size", type=int, default=32, help="images per batch [32]")
    return parser


def main() -> int:
    """Measure and print the tables."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="training steps, for the share of waiting [12]")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as made:
        root = given.root or Path(made)
        if given.root is None:
            list(write_folder(root, given.images, 10, 500, 375))
        classes = sum(entry.is_dir() for entry in os.scandir(root / "train"))
        config = DataConfig(
            dataset="imagenet", root=root, num_classes=classes, input_size=224, batch_size=given.batch_size
        )
        try:
            sources.check_data(replace(config, dataset="dali"))
            dali = True
        except UserError as error:
            print(f"without DALI: {error}")
            dali = False
        print(
            f"{device.type}, {os.cpu_count()} cores, batches of {given.batch_size}, {given.rounds} rounds\n"
        )
        rows = []
        for workers in given.workers:
            rows += speed_rows(replace(config, workers=workers), device, given.rounds, dali)
        heads = ("data set", "workers", "images/s", "decoding alone", "ratio", "with resizing")
        print(format_table(heads, rows), end="\n\n")
        rows = cpu_rows(config, device, given.rounds, dali)
        heads = ("CPU ms per image", "decoding alone", "and resizing", "data set", "ratio", "with resizing")
        print(format_table(heads, rows), end="\n\n")

        rows = []
        for name in ("imagenet", "dali") if dali else ("imagenet",):
            for workers in given.workers:
                chosen = replace(config, dataset=name, workers=workers)
                share, speed = share_waited(chosen, device, given.steps)
                rows.append((name, str(workers), f"{speed:.1f}", f"{share:.1f}"))
        print(format_table(("training ResNet-18", "workers", "images/s", "data wait %"), rows), end="\n\n")
    print(format_table(("in memory", "seconds an epoch"), small_sets(device, given.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
