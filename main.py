"""Train or evaluate a network: `python main.py --keyword ...`, usually through `bash train.sh CONFIG`.

The command line becomes one typed configuration before anything heavy is imported, so that `--help`
and a user's mistake answer at once. `run` then takes the stages of a run in their fixed order.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import keyword, schedule
from utils.config import Config, resolve, to_dict
from utils.errors import UserError
from utils.options import parse

if TYPE_CHECKING:
    from logging import Logger

    import torch
    from torch import nn

    from model.audit import Audit
    from model.health import HealthRow
    from model.summary import Cost
    from utils.checkpoint import CheckpointFiles, LoadReport
    from utils.data import Loader, Loaders
    from utils.log import Board

METRICS = (
    "epoch", "lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5",
    "seconds", "images_per_second",
)  # fmt: skip
AUDIT_BATCHES = 4
# Fields of the network that matter at its start or in the gradient only: a run may go on with others.
CHANGEABLE = {
    "re_init", "boundary", "correlate", "stable", "stable_epoch", "scale", "grad_type", "grad_scale",
    "proxquant_step", "input_size",
}  # fmt: skip


class TrainingError(Exception):
    """Training cannot go on, through no mistake in the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status: 0 done, 1 failed, 2 the user's mistake."""
    try:
        given = parse(sys.argv[1:] if argv is None else argv)
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

    from model import audit, build, calibrate, convert, health
    from utils import checkpoint, log, optim

    files = checkpoint.CheckpointFiles(settings.weights_dir, config.model.name, settings.case)
    optim.check(config.optim)
    pretrained = checkpoint.find_pretrained(
        settings.pretrained or "", settings.weights_dir, config.model.name
    )
    resumed = files.newest() if settings.resume else settings.resume_file
    if settings.evaluate and settings.resume and resumed is None and pretrained is None:
        raise UserError(f"--resume: no whole checkpoint of case {settings.case} in {files.folder} to evaluate")

    from utils import data

    data.check(config.data)

    # 2. Build the network and load weights into it.
    seed_generators(settings.seed)
    model = build.build(config.model)
    report = None if pretrained is None else load_pretrained(model, pretrained, config)
    cost = trial(model, config)

    # 3. Data, and what depends on its length.
    loaders = data.build(config.data)
    build.set_stable(model, len(loaders.train))
    steps_per_epoch = math.ceil(len(loaders.train) / config.optim.iter_size)
    rates = schedule.Schedule(config.schedule, config.optim.lr, steps_per_epoch)

    # 4. Device, the quantizers' ranges, the optimizer; then the state of the run that goes on.
    device, device_warnings = choose_device(settings.device_ids)
    model.to(device)
    initialised = 0
    if config.model.quant.re_init and resumed is None:
        images, _ = next(iter(loaders.train))
        initialised = calibrate.initialise_ranges(model, to_device(images, device))
    optimizer, groups = optim.build(model, config.optim)
    state = RunState() if resumed is None else restore(resumed, model, optimizer, config)

    # 5. Only from here on is anything written, so that a mistake leaves no trace.
    if settings.dry_run or settings.lr_test:
        print(describe(config, cost.table(), optim.table(groups), rates, settings.lr_test))
        return 0
    if resumed is None and not settings.evaluate:
        keep_earlier_run(folder, files)
    logger = log.setup(folder / "log.txt", settings.verbose)
    try:
        for warning in (*config.warnings, *device_warnings, *state.differences):
            logger.warning("warning: %s", warning)
        logger.info("%s, %s, keywords %s", config.model.name, config.data.dataset, ",".join(config.keywords))
        logger.info("%s", cost.totals())
        if config.model.quant.enabled:
            logger.info("in full precision: %s", ", ".join(convert.full_precision(model)) or "no layer")
        if report is not None:
            logger.info("pretrained %s: %s", pretrained, report.summary())
        if initialised:
            logger.info("re_init: initialised %d quantizers", initialised)
        logger.debug("%s", optim.table(groups))
        if resumed is not None:
            logger.info("resumed %s: %d epochs are done", resumed, state.epoch)
        elif settings.resume:
            logger.info("--resume: no checkpoint of the case %s yet, starting anew", settings.case)

        # 6. Evaluate only.
        if settings.evaluate:
            return evaluate(model, loaders, device, config, logger)

        # 7. Train.
        metrics = log.MetricsFile(folder / "metrics.csv", METRICS)
        metrics.truncate_after(state.epoch + 1)
        write_text(folder / "config.yaml", dump_yaml(config))
        board = log.Board(folder / "tensorboard" if settings.tensorboard else None, purge_step=state.epoch + 1)
        watched = health.Health(model) if settings.verbose or settings.tensorboard else None
        last = config.schedule.epochs + config.schedule.extra_epoch
        for epoch in range(state.epoch, last):
            started = time.perf_counter()
            row = {"epoch": epoch + 1, "lr": rates.at(epoch * rates.steps_per_epoch)}
            row |= train_one_epoch(model, loaders.train, optimizer, rates, epoch, device, config, logger)
            if loaders.val is not None:
                row |= {f"val_{name}": value for name, value in validate(model, loaders.val, device).items()}
            row["seconds"] = time.perf_counter() - started
            metrics.append(row)
            board.scalars({name: value for name, value in row.items() if name != "epoch"}, epoch + 1)
            if watched is not None:
                report_health(watched.report(audit_batches(loaders, device)[0]), board, epoch + 1, logger)
            best = loaders.val is not None and row["val_top1"] > state.best_acc
            state = RunState(epoch + 1, max(state.best_acc, row.get("val_top1", -math.inf)))
            save(state, model, optimizer, rates, files, config, best=best)
            logger.info("%s", epoch_line(row, last, state.best_acc))
        board.close()

        # 8. What came of it.
        found = audit.audit(model, audit_batches(loaders, device))
        finish(config, cost, found, state, folder, files, logger)
        return 1 if found.problems else 0
    finally:
        log.close()


@dataclasses.dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        epoch: epochs done.
        best_acc: best top-1 of a validation so far, percent; -inf before the first.
        differences: options that changed since the checkpoint that the run continues from.
    """

    epoch: int = 0
    best_acc: float = -math.inf
    differences: tuple[str, ...] = ()


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
            f"{first_nonfinite(model, images)}; the last checkpoint is whole; try a lower --lr, --grad_clip or --re_init"
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
    found = audit.audit(model, audit_batches(loaders, device))
    logger.info("%s\naudit: %s", found.table(), found.verdict)
    return 1 if found.problems else 0


def report_health(rows: list[HealthRow], board: Board, epoch: int, logger: Logger) -> None:
    """Each quantizer's state after an epoch, to the log (`--verbose`) and to TensorBoard."""
    from model import health

    if rows:
        logger.debug("%s", health.table(rows))
    for row in rows:
        board.scalars({f"health/{name}": value for name, value in row.scalars().items()}, epoch)


def audit_batches(loaders: Loaders, device: torch.device) -> list[torch.Tensor]:
    """A few batches of real images, of the validation set where there is one."""
    loader = loaders.train if loaders.val is None else loaders.val
    return [to_device(images, device) for images, _ in itertools.islice(loader, AUDIT_BATCHES)]


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
            raise UserError(f"--device_ids {index}: there are {torch.cuda.device_count()} GPUs, counted from 0")
        return torch.device("cuda", index), ()
    warnings = tuple(f"--device_ids {index}: no GPU is available, running on the CPU" for index in device_ids)
    return torch.device("cpu"), warnings


def load_pretrained(model: nn.Module, path: Path, config: Config) -> LoadReport:
    """Load weights into the network; quantizers that the file does not have keep their start values.

    The number of levels is the command line's, not the file's, so that a 4-bit checkpoint can start a
    2-bit network; evaluating it at other levels than it was trained for is an error. Training counts
    its iterations from zero, so that a warm-up takes place.
    """
    from model.quant import quantizers
    from utils import checkpoint

    state = checkpoint.state_dict_of(checkpoint.read(path), source=str(path))
    own = dict(quantizers(model))
    for name, quantizer in own.items():
        levels = state.pop(f"{name}.level_num", None)
        if not config.run.evaluate:
            state.pop(f"{name}.iteration", None)
        if config.run.evaluate and levels is not None and int(levels) != quantizer.levels:
            raise UserError(
                f"{path}: {name} was trained with {int(levels)} levels, the options say {quantizer.levels}: "
                f"give --{quantizer.config.tag}_level {int(levels)} or the bits that mean it"
            )
    prefixes = tuple(f"{name}." for name in own)
    return checkpoint.load_weights(
        model,
        state,
        allow_missing=lambda name: name.startswith(prefixes) if prefixes else False,
        scope=config.run.unresume_scope,
        source=str(path),
    )


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> RunState:
    """Everything of a checkpoint that training continues from."""
    from model.quant import quantizers
    from utils import checkpoint

    payload = checkpoint.read(path)
    changed = differences(payload.get("config", {}), to_dict(config))
    for line in changed:
        field = line.split(" ", 1)[0]
        network = field.startswith("model.") and field.rpartition(".")[2] not in CHANGEABLE
        if network or field == "optim.name":
            raise UserError(f"{path} cannot be continued: {line}; --pretrained starts another run from it")
    state = checkpoint.state_dict_of(payload, source=str(path))
    checkpoint.load_weights(model, state, allow_missing=lambda name: False, source=str(path))
    for name, quantizer in quantizers(model):
        quantizer.set_levels(int(state[f"{name}.level_num"]))
    if config.run.evaluate:
        return RunState(payload.get("epoch", 0), payload.get("best_acc", -math.inf))
    missing = [name for name in ("epoch", "optimizer", "best_acc", "random") if name not in payload]
    if missing:
        raise UserError(f"{path} holds no {', '.join(missing)}, so training cannot continue; use --pretrained")
    # The options' hyperparameters count, as far as they differ from the checkpoint's.
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(payload["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} holds another optimizer's state ({error}); use --pretrained") from error
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update(option)
    checkpoint.set_random_state(payload["random"])
    return RunState(payload["epoch"], payload["best_acc"], changed)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Fields of the configuration that changed, of those that change the training."""
    found: list[str] = []
    for name in before.keys() & now.keys() - {"run", "keywords", "origins", "warnings"}:
        old, new = before[name], now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old} and is {new} now")
    return tuple(sorted(found))


def save(
    state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer, rates: schedule.Schedule, files: CheckpointFiles,
    config: Config, *, best: bool,
) -> None:  # fmt: skip
    """Write the latest checkpoint, and the best and the epoch's where they are due."""
    from utils import checkpoint

    payload = {
        "epoch": state.epoch,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"step": state.epoch * rates.steps_per_epoch},
        "best_acc": state.best_acc,
        "learning_rate": rates.at(state.epoch * rates.steps_per_epoch - 1),
        "amp": {},
        "random": checkpoint.random_state(),
        "config": to_dict(config),
    }
    checkpoint.save(files.latest, payload)
    if best:
        checkpoint.save(files.best, payload)
    if config.run.save_freq and state.epoch % config.run.save_freq == 0:
        checkpoint.save(files.epoch(state.epoch), payload)


def keep_earlier_run(folder: Path, files: CheckpointFiles) -> None:
    """Rename what an earlier run of the same case left to CASE.N, so that nothing is overwritten."""
    mine = files.existing()
    if not mine and not (folder / "metrics.csv").exists():
        return
    names = (f"{files.case}.{number}" for number in itertools.count(1))
    earlier = next(
        name for name in names
        if not folder.with_name(name).exists() and not dataclasses.replace(files, case=name).existing()
    )  # fmt: skip
    try:
        if folder.exists():
            folder.rename(folder.with_name(earlier))
        for path in mine:
            path.rename(path.with_name(earlier + path.name.removeprefix(files.case)))
    except OSError as error:
        raise UserError(f"cannot move the earlier run of {files.case} away: {error}; use another --case") from error
    print(f"the earlier run of the case {files.case} is kept as {earlier}")


def epoch_line(row: dict[str, float], last: int, best: float) -> str:
    """One epoch for the log."""
    text = f"epoch {row['epoch']:.0f}/{last}: loss {row['train_loss']:.4f}, top-1 {row['train_top1']:.2f}"
    if "val_top1" in row:
        text += f"; validation: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} (best {best:.2f})"
    return f"{text}; lr {row['lr']:.3g}, {row['images_per_second']:.0f} images/s, {row['seconds']:.1f} s"


def finish(
    config: Config, cost: Cost, found: Audit, state: RunState, folder: Path, files: CheckpointFiles, logger: Logger
) -> None:  # fmt: skip
    """Write the run's summary and picture, and name them."""
    from utils import log

    metrics = folder / "metrics.csv"  # not there when a finished run was continued under another case
    rows = log.MetricsFile.read(metrics) if metrics.exists() else []
    log.draw_curves(rows, folder / "curves.png", f"{config.run.case} ({config.model.name}, {cost.bits} bits)")
    write_text(folder / "audit.txt", f"{found.table()}\n{found.verdict}\n")
    result = {
        "case": config.run.case,
        "network": config.model.name,
        "dataset": config.data.dataset,
        "bits": cost.bits,
        "epochs": state.epoch,
        "best_top1": state.best_acc if math.isfinite(state.best_acc) else None,
        "last_top1": rows[-1]["val_top1"] if rows and math.isfinite(rows[-1]["val_top1"]) else None,
        "weight_bytes": cost.weight_bytes,
        "float_weight_bytes": cost.float_weight_bytes,
        "macs": cost.macs,
        "bit_operations": cost.bit_operations,
        "audit": found.verdict,
        "seed": config.run.seed,
    }
    write_text(folder / "summary.json", json.dumps(result, indent=2) + "\n")
    logger.info("audit: %s", found.verdict)
    for problem in found.problems:
        logger.error("audit: %s", problem)
    best = f"best top-1 {state.best_acc:.2f}; " if math.isfinite(state.best_acc) else ""
    logger.info("%scheckpoints %s", best, ", ".join(map(str, files.existing())))
    written = ["metrics.csv", "curves.png", "config.yaml", "audit.txt", "summary.json", "log.txt"]
    logger.info("look at: %s", ", ".join(str(folder / name) for name in written if (folder / name).exists()))
    if config.run.tensorboard:
        logger.info("TensorBoard: tensorboard --logdir %s", folder / "tensorboard")


def write_text(path: Path, text: str) -> None:
    """Write a small file of a run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another folder with --log_dir") from error


def dump_yaml(config: Config) -> str:
    """The configuration as YAML."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def describe(config: Config, network: str, groups: str, rates: schedule.Schedule, schedule_only: bool) -> str:
    """What `--dry_run` and the keyword `lr-test` print."""
    if schedule_only:
        steps = range(config.schedule.epochs + config.schedule.extra_epoch)
        lines = [f"{epoch:5d}  {rates.at(epoch * rates.steps_per_epoch):.8g}" for epoch in steps]
        return "\n".join(["epoch  learning rate at its first step", *lines])
    changes = ", ".join(f"{epoch}: {rate:.6g}" for epoch, rate in rates.changes())
    origins = "\n".join(f"{name}: {origin}" for name, origin in config.origins.items())
    warnings = "".join(f"warning: {warning}\n" for warning in config.warnings)
    return (
        f"{dump_yaml(config)}\nset by:\n{origins}\n\n{network}\n\nparameter groups:\n{groups}\n\n"
        f"learning rate at the epochs where it changes: {changes}\n{warnings}dry run: everything checked, nothing trained"
    )


if __name__ == "__main__":
    sys.exit(main())
