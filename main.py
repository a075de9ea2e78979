"""Train or evaluate a network: `python main.py --keyword ...`, usually through `bash train.sh CONFIG`.

The command line becomes one typed configuration before anything heavy is imported, so that `--help`
and a user's mistake answer at once. `run` then takes the stages of a run in their fixed order.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils import keyword, schedule
from utils.config import Config, resolve
from utils.errors import UserError
from utils.options import parse

if TYPE_CHECKING:
    from logging import Logger

    import torch
    from torch import nn

    from model.summary import Cost
    from utils.data import Loader, Loaders

METRICS = (
    "epoch", "lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5",
    "seconds", "images_per_second",
)  # fmt: skip
AUDIT_BATCHES = 4


class TrainingError(Exception):
    """Training cannot go on, through no mistake in the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status: 0 done, 1 failed, 2 the user's mistake."""
    try:
        given = parse(sys.argv[1:] if argv is None else argv)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("distributed training is not there yet: start one process (NPROC, nproc, -g)")
        if given["keyword_file"] is not None:
            keyword.load_file(given["keyword_file"])
        if given["list_keywords"]:
            print(keyword.table())
            return 0
        config = resolve(given)
        return run(config)
    except UserError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"main.py: failed: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that went away
        print(f"main.py: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        return 130


def run(config: Config) -> int:
    """One run, from the configuration to the last epoch; returns the exit status."""
    # 1. Check what can be checked without work; what is slow to import comes as late as it can.
    settings = config.run
    schedule.check(config.schedule, config.optim.lr)
    folder = settings.log_dir / settings.case
    check_folder(folder, "log_dir")
    if not settings.evaluate:
        check_folder(settings.weights_dir / config.model.name, "weights_dir")
    if settings.resume_file is not None and not os.path.isfile(settings.resume_file):
        raise UserError(f"--resume_file {settings.resume_file}: no such file; -r finds a case's newest")

    import torch

    from model import audit, build, calibrate, convert, health
    from model.quant import quantizers
    from utils import checkpoint, log, optim, report, state

    files = checkpoint.CheckpointFiles(settings.weights_dir, config.model.name, settings.case)
    optim.check(config.optim)
    pretrained = checkpoint.find_pretrained(
        settings.pretrained or "", settings.weights_dir, config.model.name
    )
    resumed = files.newest() if settings.resume else settings.resume_file
    if settings.evaluate and settings.resume and resumed is None and pretrained is None:
        raise UserError(
            f"--resume: no whole checkpoint of case {settings.case} in {files.folder} to evaluate"
        )

    from utils import data

    data.check(config.data)

    # 2. Build the network and load weights into it.
    seed_generators(settings.seed)
    model = build.build(config.model)
    loaded = None if pretrained is None else state.load_pretrained(model, pretrained, config)
    cost = trial(model, config)

    # 3. Data, and what depends on its length.
    loaders = data.build(config.data)
    build.set_stable(model, len(loaders.train))
    steps_per_epoch = math.ceil(len(loaders.train) / config.optim.iter_size)
    rates = schedule.Schedule(config.schedule, config.optim.lr, steps_per_epoch)

    rates, shortened = fit_warmups(model, config, len(loaders.train), rates)

    # 4. Device, the quantizers' ranges, the optimizer; then the state of the run that goes on.
    device, device_warnings = choose_device(settings.device_ids)
    model.to(device=device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    initialised = 0
    trains = not (settings.evaluate or settings.dry_run or settings.lr_test)
    if config.model.quant.re_init and resumed is None and trains:
        images, _ = next(iter(loaders.train))
        initialised = calibrate.initialise_ranges(model, to_device(images, device))
    optimizer, groups = optim.build(model, config.optim)
    warnings = (*config.warnings, *shortened, *optim.idle_entries(model, config.optim), *device_warnings)
    progress = state.RunState() if resumed is None else state.restore(resumed, model, optimizer, config)

    # 5. Only from here on is anything written, so that a mistake leaves no trace.
    if settings.dry_run or settings.lr_test:
        print(report.describe(config, cost.table(), optim.table(groups), rates, warnings))
        return 0
    own = {path.resolve() for path in files.existing()}
    if not settings.evaluate and (resumed is None or resumed.resolve() not in own):
        state.keep_earlier_run(folder, files)
    logger = log.setup(folder / "log.txt", settings.verbose)
    try:
        for warning in (*warnings, *progress.differences):
            logger.warning("warning: %s", warning)
        logger.info("%s, %s, keywords %s", config.model.name, config.data.dataset, ",".join(config.keywords))
        logger.info("%s", cost.totals())
        if config.model.quant.enabled:
            logger.info("in full precision: %s", ", ".join(convert.full_precision(model)) or "no layer")
        if loaded is not None:
            logger.info("pretrained %s: %s", pretrained, loaded.summary())
        if initialised:
            logger.info("re_init: initialised %d quantizers", initialised)
        logger.debug("%s", optim.table(groups))
        for name, quantizer in quantizers(model):
            logger.debug("%s: %s", name, quantizer.config)
        if resumed is not None:
            logger.info("resumed %s: %d epochs are done", resumed, progress.epoch)
        elif settings.resume:
            logger.info("--resume: no checkpoint of the case %s yet, starting anew", settings.case)

        # 6. Evaluate only.
        if settings.evaluate:
            if loaded is None and resumed is None:
                logger.warning("warning: no checkpoint is given, so this evaluates random weights")
            return evaluate(model, loaders, device, config, logger)

        # 7. Train.
        metrics = log.MetricsFile(folder / "metrics.csv", METRICS)
        metrics.truncate_after(progress.epoch + 1)
        report.write_text(folder / "config.yaml", report.dump_yaml(config))
        board = log.Board(
            folder / "tensorboard" if settings.tensorboard else None, purge_step=progress.epoch + 1
        )
        watched = health.Health(model) if settings.verbose or settings.tensorboard else None
        last = config.schedule.epochs + config.schedule.extra_epoch
        for epoch in range(progress.epoch, last):
            started = time.perf_counter()
            row = {"epoch": epoch + 1, "lr": rates.at(epoch * rates.steps_per_epoch)}
            row |= train_one_epoch(model, loaders.train, optimizer, rates, epoch, device, config, logger)
            if loaders.val is not None:
                row |= {f"val_{name}": value for name, value in validate(model, loaders.val, device).items()}
            check_epoch(model, row, loaders, device)
            row["seconds"] = time.perf_counter() - started
            metrics.append(row)
            board.scalars({name: value for name, value in row.items() if name != "epoch"}, epoch + 1)
            if watched is not None:
                report.report_health(
                    watched.report(audit_batches(loaders, device, 1)[0]), board, epoch + 1, logger
                )
            # A network whose quantizers still let everything pass is not the best low-bit network.
            candidate = row.get("val_top1", -math.inf) if build.is_quantized(model) else -math.inf
            best = candidate > progress.best_acc
            progress = state.RunState(epoch + 1, max(progress.best_acc, candidate))
            state.save(progress, model, optimizer, rates, files, config, best=best)
            logger.info("%s", report.epoch_line(row, last, progress.best_acc))
        board.close()

        # 8. What came of it.
        found = audit.audit(model, audit_batches(loaders, device), config.model.quant)
        report.finish(config, cost, found, progress, folder, files, logger)
        return 1 if found.problems else 0
    finally:
        log.close()


def train_one_epoch(
    model: nn.Module, loader: Loader, optimizer: torch.optim.Optimizer, rates: schedule.Schedule, epoch: int,
    device: torch.device, config: Config, logger: Logger,
) -> dict[str, float]:  # fmt: skip
    """Train one epoch; returns the row `train_loss`, `train_top1`, `train_top5`, `images_per_second`."""
    import torch
    from torch.nn import functional

    from utils import log

    model.train()
    loader.set_epoch(epoch)
    loss_mean, top1, top5 = log.Mean(), log.Mean(), log.Mean()
    passes = config.optim.iter_size
    batches = len(loader)
    images_seen, started = 0, time.perf_counter()
    optimizer.zero_grad()
    bar = log.progress(loader, batches, f"epoch {epoch + 1}", enabled=True)
    for i, (images, target) in enumerate(bar):
        images, target = to_device(images, device), target.to(device, non_blocking=True)
        output = model(images)
        loss = functional.cross_entropy(output, target, label_smoothing=config.run.label_smooth)
        # Looking costs nothing on the CPU; elsewhere it would wait for the device, so only reports look.
        if device.type == "cpu" or (i + 1) % config.run.report_freq == 0 or i + 1 == batches:
            check_finite(loss, model, images, f"epoch {epoch + 1}, iteration {i + 1}")
        # The last group of an epoch may be shorter; every group's gradient is a mean all the same.
        group = min(passes, batches - i // passes * passes)
        (loss / group).backward()
        if (i + 1) % passes == 0 or i + 1 == batches:
            step = epoch * rates.steps_per_epoch + i // passes
            rates.apply(optimizer, step)
            if config.optim.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            if not rates.skip_update(step):
                optimizer.step()
            optimizer.zero_grad()

        hits1, hits5 = log.top_k(output.detach(), target)
        loss_mean.update(loss.detach(), len(target))
        top1.update(100 * hits1 / len(target), len(target))
        top5.update(100 * hits5 / len(target), len(target))
        images_seen += len(target)
        if config.run.delay > 0:
            time.sleep(config.run.delay)
        if (i + 1) % config.run.report_freq == 0 and i + 1 < batches:  # the epoch has a line of its own
            logger.info(
                "epoch %d, %d/%d: loss %.4f, top-1 %.2f, lr %.3g",
                epoch + 1, i + 1, batches, loss_mean.value, top1.value, optimizer.param_groups[0]["lr"],
            )  # fmt: skip
    speed = images_seen / (time.perf_counter() - started)
    return {
        "train_loss": loss_mean.value,
        "train_top1": top1.value,
        "train_top5": top5.value,
        "images_per_second": speed,
    }


def check_finite(loss: torch.Tensor, model: nn.Module, images: torch.Tensor, where: str) -> None:
    """Stop the run, before the weights take the step, when the loss is NaN or infinite."""
    from model.health import first_nonfinite

    if not math.isfinite(float(loss.detach())):
        raise TrainingError(
            f"the loss is not finite in {where}; the first layer with such an output is "
            f"{first_nonfinite(model, images)}; nothing of this epoch is saved; "
            "try a lower --lr, --grad_clip or --re_init"
        )


def check_epoch(model: nn.Module, row: dict[str, float], loaders: Loaders, device: torch.device) -> None:
    """Stop the run before it saves weights that the last step of the epoch has ruined."""
    from model.health import first_nonfinite

    bad = [name for name, value in model.state_dict().items() if not bool(value.isfinite().all())]
    if bad or not math.isfinite(row.get("val_loss", 0.0)):
        where = f"{bad[0]} is not finite" if bad else "the validation loss is not finite"
        raise TrainingError(
            f"{where} after epoch {row['epoch']:.0f}; the first layer with such an output is "
            f"{first_nonfinite(model, audit_batches(loaders, device, 1)[0])}; nothing of this epoch is saved; "
            "try a lower --lr, --grad_clip or --re_init"
        )


def validate(model: nn.Module, loader: Loader, device: torch.device) -> dict[str, float]:
    """Loss and accuracy (percent) over a whole data set: `loss`, `top1`, `top5`."""
    import torch
    from torch.nn import functional

    from utils import log

    model.eval()
    loss_mean, top1, top5 = log.Mean(), log.Mean(), log.Mean()
    with torch.no_grad():
        for images, target in log.progress(loader, len(loader), "validation", enabled=True):
            images, target = to_device(images, device), target.to(device, non_blocking=True)
            output = model(images)
            hits1, hits5 = log.top_k(output, target)
            loss_mean.update(functional.cross_entropy(output, target), len(target))
            top1.update(100 * hits1 / len(target), len(target))
            top5.update(100 * hits5 / len(target), len(target))
    return {"loss": loss_mean.value, "top1": top1.value, "top5": top5.value}


def evaluate(model: nn.Module, loaders: Loaders, device: torch.device, config: Config, logger: Logger) -> int:
    """Validate, and audit when asked to; returns the exit status."""
    from model import audit

    assert loaders.val is not None  # checked with the options
    row = validate(model, loaders.val, device)
    logger.info("top-1 %.2f, top-5 %.2f, loss %.4f", row["top1"], row["top5"], row["loss"])
    if not config.run.audit:
        return 0
    found = audit.audit(model, audit_batches(loaders, device), config.model.quant)
    logger.info("%s\naudit: %s", found.table(), found.verdict)
    return 1 if found.problems else 0


def audit_batches(loaders: Loaders, device: torch.device, count: int = AUDIT_BATCHES) -> list[torch.Tensor]:
    """A few batches of real images, of the validation set where there is one."""
    loader = loaders.train if loaders.val is None else loaders.val
    return [to_device(images, device) for images, _ in itertools.islice(loader, count)]


def to_device(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Images [N, 3, S, S] where and how the network takes them: channels last, the faster layout."""
    import torch

    return images.to(device, non_blocking=True, memory_format=torch.channels_last)


def check_folder(folder: Path, option: str) -> None:
    """Refuse a folder that could not be made or written."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"--{option}: {there} is not a folder; choose another --{option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--{option}: {there} cannot be written; choose another --{option}")


def seed_generators(seed: int) -> None:
    """Start the global random generators; a seed of up to 63 bits."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's limit
    torch.manual_seed(seed)


def fit_warmups(
    model: nn.Module, config: Config, batches: int, rates: schedule.Schedule
) -> tuple[schedule.Schedule, tuple[str, ...]]:
    """The schedule with warm-ups that fit into the run, and warnings.

    A warm-up that the run never leaves is a mistake. Where the command line has shortened the run of a
    config, whose warm-ups are for the long one, they shrink to half of what there is.
    """
    from model.quant import quantizers

    total = (config.schedule.epochs + config.schedule.extra_epoch) * batches
    longest = max((quantizer.stable for _, quantizer in quantizers(model)), default=0)
    skips = rates.skip_update(rates.total_steps - 1)
    warnings: list[str] = []
    if config.run.evaluate:
        return rates, ()
    if longest >= total:
        if not config.run.shortened:
            raise UserError(
                f"--stable: a warm-up of {longest} iterations is the whole run of {total}; shorten it"
            )
        warnings.append(f"--stable: the shortened run of {total} iterations takes {total // 2} of {longest}")
        for _, quantizer in quantizers(model):
            quantizer.stable = total // 2
    if skips:
        steps = rates.total_steps
        if not config.run.shortened:
            raise UserError(f"--warmup: no iteration of {steps} is left for the optimizer; shorten it")
        warnings.append(f"--warmup: the shortened run of {steps} iterations takes {steps // 2}")
        rates = dataclasses.replace(
            rates, config=dataclasses.replace(rates.config, warmup=steps // 2, warmup_epoch=0)
        )
    return rates, tuple(warnings)


def trial(model: nn.Module, config: Config) -> Cost:
    """What the network costs, found by running it once, which shows that the image size suits it."""
    from model import summary

    try:
        return summary.cost(model, config.model.input_size)
    except (RuntimeError, ValueError) as error:  # how torch says that shapes do not fit
        raise UserError(
            f"--input_size {config.model.input_size}: {config.model.name} cannot take images of this size "
            f"({error}); use a multiple of 32, or of 4 for the networks of three stages"
        ) from error


def choose_device(device_ids: tuple[int, ...]) -> tuple[torch.device, tuple[str, ...]]:
    """The GPU that was asked for, else the first one, else the CPU; and warnings."""
    import torch

    if torch.cuda.is_available():
        index = device_ids[0] if device_ids else 0
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device_ids {index}: there are {torch.cuda.device_count()} GPUs, counted from 0"
            )
        return torch.device("cuda", index), ()
    warnings = tuple(f"--device_ids {index}: no GPU is available, running on the CPU" for index in device_ids)
    return torch.device("cpu"), warnings


if __name__ == "__main__":
    sys.exit(main())
