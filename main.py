"""Train or evaluate a network: `python main.py --keyword ...`, usually through `bash train.sh CONFIG`.

The command line becomes one typed configuration before anything heavy is imported, so that `--help`
and a user's mistake answer at once. `run` then takes the stages of a run in their fixed order.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the middle of an import would leave a broken module behind, or be lost in it.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"main.py: interrupted\n"), os._exit(130)))

import contextlib
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import launch
from utils import keyword, schedule
from utils.config import Config
from utils.errors import LostError, TrainingError, UserError
from utils.interrupt import SAVED, SIGNALS, Stop
from utils.options import parse
from utils.resolve import resolve

if TYPE_CHECKING:
    import torch

    from utils.data import Loader, Loaders
    from utils.log import MetricsFile
    from utils.parts import Parts
    from utils.record import Recorder
    from utils.state import RunState

METRICS = (
    "epoch", "lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5",
    "ema_loss", "ema_top1", "ema_top5", "frozen", "seconds", "images_per_second", "data_wait",
)  # fmt: skip
AUDIT_BATCHES = 4
AUDIT_FAILED = 3  # exit status
PATIENCE = 5  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status.

    0 done, 1 failed, 2 the user's mistake, 3 trained but the audit failed, 75 asked to end and saved, 130
    interrupted before there was anything to save.
    """
    return launch.leave_status(answer(argv))


def answer(argv: Sequence[str] | None) -> int:
    """Run the program with its errors as one line each; returns the exit status."""
    try:
        given = parse(sys.argv[1:] if argv is None else argv)
        if given["keyword_file"] is not None:
            keyword.load_file(given["keyword_file"])
        if given["list_keywords"]:
            print(keyword.table())
            return 0
        config = resolve(given)
        start_processes(config, argv)
        return run(config)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            wait_to_be_ended()  # the first process says it too, nearly always
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, OSError) as error:  # OSError: a full disk, a folder that went away
        if isinstance(error, LostError) and "TORCHELASTIC_RUN_ID" in os.environ:
            # The status is to be that of the one that ended first, for which the launcher may have ended this one.
            if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Stop):
                return 1
            wait_to_be_ended()
        print(f"main.py: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        return 130


def wait_to_be_ended() -> None:
    """Give the launcher time to end this process, because of another one, before it says what is wrong here."""
    # Not the end without cleaning up, of which Python would warn.
    for number in SIGNALS:
        signal.signal(number, lambda *_: sys.exit(1))
    time.sleep(PATIENCE)


def run(config: Config) -> int:
    """One run, from the configuration to the last epoch; returns the exit status."""
    # 1. Check what can be checked without work; what is slow to import comes as late as it can.
    settings = config.run
    schedule.check(config.schedule, config.optim.lr)
    folder = settings.log_dir / settings.case
    check_folder(folder, "log_dir")
    if not settings.evaluate:
        check_folder(settings.weights_dir / config.model.name, "weights_dir")

    from model import audit, build, calibrate, summary, sync_norm
    from utils import (
        checkpoint,
        distributed,
        fit,
        log,
        methods,
        optim,
        policy,
        precision,
        probe,
        record,
        report,
        state,
        teacher,
    )  # fmt: skip

    place = distributed.place(config.devices, os.environ)
    if place.first and settings.resume_file is not None and not os.path.isfile(settings.resume_file):
        raise UserError(f"--resume_file {settings.resume_file}: no such file; -r finds a case's newest")
    shard = dataclasses.replace(config.data, rank=place.rank, world_size=place.world_size)
    config = dataclasses.replace(config, data=shard)
    device, device_warnings = distributed.device_of(place, config.devices)
    device_warnings += precision.check(config.precision, device)
    files = checkpoint.CheckpointFiles(settings.weights_dir, config.model.name, settings.case)
    optim.check(config.optim)
    distill = None if settings.evaluate else config.loss.distill
    taught_by = None if distill is None else teacher.find(distill, settings.weights_dir)

    from utils import data
    from utils.parts import Parts

    data.check(config.data)
    with distributed.joined(place, device):
        launchers = distributed.launchers(os.environ)
        found = distributed.from_first(lambda: files.find(settings.resume, settings.resume_file, launchers))
        pretrained = None  # what is gone on with holds its weights, and the file may have moved since
        if found.path is None:
            pretrained = checkpoint.find_pretrained(
                settings.pretrained or "", settings.weights_dir, config.model.name
            )
        if settings.evaluate and settings.resume and found.path is None and settings.pretrained is None:
            raise UserError(
                f"--resume: no whole checkpoint of case {settings.case} in {files.folder} to evaluate; with "
                "--pretrained none random weights are"
            )

        # 2. Build the network and load weights into it.
        seed_generators(settings.seed)
        model = build.build(config.model)
        initial = policy.initialise(model, config.policy)
        loaded = None if pretrained is None else state.load_pretrained(model, pretrained, config)
        cost = fit.trial(model, config)
        constant_signs = fit.signs(model, config)
        tutor = None
        if distill is not None and taught_by is not None:
            tutor = teacher.Teacher(distill, taught_by)

        # 3. Data, and what depends on its length.
        loaders = data.build(config.data, device)
        fit.batches(config, loaders.train.samples)
        build.set_stable(model, len(loaders.train))
        steps_per_epoch = math.ceil(len(loaders.train) / config.optim.iter_size)
        rates = schedule.Schedule(config.schedule, config.optim.lr, steps_per_epoch)
        rates, shortened = fit.warmups(model, config, len(loaders.train), rates)

        # 4. Device, the quantizers' ranges, the optimizer; then the state of the run that goes on.
        layout = precision.memory_format(model, config.precision, device)
        model.to(device=device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        initialised = 0
        trains = not (settings.evaluate or settings.dry_run or settings.lr_test)
        if config.model.quant.re_init and found.path is None and trains:
            images, _ = next(iter(loaders.train))
            images = images.to(device, memory_format=layout)
            initialised = calibrate.initialise_ranges(model, images, config.model.quant)
        distributed.share_state(model)
        if place.rank > 0:  # all have drawn the same network; what is drawn from here on is each one's own
            seed_generators((settings.seed + place.rank * 1_000_003) % 2**63)
        if config.devices.sync_bn and place.world_size > 1:
            sync_norm.synchronise(model, device)
        precision.prepare(model, config.precision)
        optimizer, groups = optim.build(model, config.optim)
        warnings = (*config.warnings, *shortened, *optim.idle_entries(model, config.optim), *device_warnings)
        warnings += audit.unexplained(model) + constant_signs
        steering = policy.Steering(
            config.policy, model, optimizer, groups, config.optim, rates, shortened=settings.shortened
        )
        warnings += steering.warnings
        progress = state.RunState()
        if found.path is not None:
            progress = state.restore(found.payload, found.path, model, optimizer, config)
            changed = state.schedule_change(found.payload, progress, config, steps_per_epoch)
            warnings += (changed,) * (changed != "" and not settings.evaluate)
        with state.believing(found.path):
            step = state.next_step(progress, config, steps_per_epoch, len(loaders.train))
            steering.load_state_dict(progress.policy, step)
        probed = None
        if config.probe.enable and place.first and not settings.evaluate:
            images = min(config.data.batch_size, loaders.train.samples)
            probed = probe.Probe(
                model, config.probe, folder / "probe", steps=rates.total_steps, images=images
            )
        arithmetic = precision.build(model, optimizer, config.precision, device)
        with state.believing(found.path):
            arithmetic.load_state_dict(progress.amp)
        if tutor is not None:
            tutor.to(device, layout)
        training = methods.build(config, model, tutor, steering.rates.total_steps)
        with state.believing(found.path):
            training.load_state_dict(progress.methods, model)

        # 5. Only from here on is anything written, so that a mistake leaves no trace.
        if settings.dry_run or settings.lr_test:
            if place.first:
                plan, rates = steering.describe(initial), steering.planned_rates
                print(
                    report.describe(config, cost.table(), optim.table(groups), plan, rates, warnings, folder)
                )
            return 0
        if place.first and not settings.evaluate:
            state.prepare_files(folder, files, found, chosen=settings.resume_file)
        logger = log.setup(folder / "log.txt", settings.verbose) if place.first else log.silent(place.rank)
        try:
            for warning in (*warnings, *found.passed_over, *progress.differences):
                logger.warning("warning: %s", warning)
            report.announce(config, cost, model, groups, logger)
            if loaded is not None:
                logger.info("pretrained %s: %s", pretrained, loaded.summary())
            if initialised:
                logger.info("re_init: initialised %d quantizers", initialised)
            steering.log = logger.info
            if found.path is None:
                for change in (*initial, *(change for change in steering.plan if change.when == "init")):
                    logger.info("%s", change)
            else:
                part = f" and {progress.position} images of the next" if progress.position else ""
                logger.info("resumed %s: %d epochs%s are done", found.path, progress.epoch, part)
            if settings.resume and found.path is None:
                logger.info("--resume: no checkpoint of the case %s yet, starting anew", settings.case)
            network = distributed.parallel(model, device, may_skip=steering.disables)
            parts = Parts(
                model, network, optimizer, arithmetic, steering, training, device, layout, config, logger, probed
            )  # fmt: skip

            # 6. Evaluate only.
            if settings.evaluate:
                if loaded is None and found.path is None:
                    logger.warning("warning: no checkpoint is given, so this evaluates random weights")
                return evaluate(parts, loaders)

            # 7. Train.
            metrics = log.MetricsFile(folder / "metrics.csv", METRICS)
            if place.first:
                metrics.truncate_after(progress.epoch + 1)
                report.write_text(folder / "config.yaml", report.dump_yaml(config))
            recorder = None
            if place.first:
                recorder = record.Recorder(folder, model, config, progress.epoch, progress.position)
                if probed is not None:
                    probed.board = recorder.board
                if settings.tensorboard:
                    loaders.train.set_epoch(progress.epoch)
                    images, _ = next(iter(loaders.train))
                    recorder.show(images, loaders.mean, loaders.std, progress.epoch)
            if found.path is not None:
                state.set_random(found.payload, place.rank)
            with launch.stop(logger.info) as stop, checkpoint.Writer() as writer:
                save = partial(state.save, parts=parts, files=files, writer=writer, launchers=launchers)
                progress, stopped = train(parts, loaders, progress, stop, save, metrics, recorder)
                writer.wait()
                if stopped:
                    distributed.anyone(False)  # none ends before the first has written
                    logger.info("asked to end by %s: saved, -r goes on from here", stop.asked or "a process")
                    return SAVED

            # 8. What came of it.
            if recorder is None:
                return 0
            with arithmetic.autocast():
                cost = summary.cost(model, config.model.input_size)  # a policy may have changed the bits
                result = audit.audit(model, audit_batches(parts, loaders), config.model.quant)
            recorder.finish(report.finish(config, cost, result, progress, folder, files, logger))
            return AUDIT_FAILED if result.problems else 0
        except (TrainingError, UserError, OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):  # a full disk takes no log either
                logger.error("failed: %s", str(error).partition("\n")[0], extra={"to_file_only": True})
            raise
        finally:
            log.close()


def train(
    parts: Parts, loaders: Loaders, progress: RunState, stop: Stop, save: Callable[..., None], metrics: MetricsFile,
    recorder: Recorder | None,
) -> tuple[RunState, bool]:  # fmt: skip
    """Train from `progress` to the end of the run, or until a process was asked to stop.

    Args:
        parts: the training.
        loaders: the images.
        progress: how far it is.
        stop: whether this process was asked to end.
        save: writes a checkpoint of a state, as the best one too with `best=True`.
        metrics: gets a row an epoch, from the first process.
        recorder: what else the first process writes; None in others.

    Returns:
        How far it came, saved, and whether it was stopped.
    """
    from model import build
    from utils import distributed, finite, report, state

    config = parts.config
    last = config.schedule.epochs + config.schedule.extra_epoch
    for epoch in range(progress.epoch, last):
        progress, stopped = train_one_epoch(parts, loaders.train, progress, stop, save)
        row = train_row(parts, progress)
        if loaders.val is not None and not stopped:
            began = time.perf_counter()
            row |= validation_row(parts, loaders, epoch, stop)
            row["seconds"] += time.perf_counter() - began
            stopped = distributed.anyone(stop.asked != "")
        if stopped:
            save(progress)
            return progress, True
        finite.check_epoch(parts, row, lambda: audit_batches(parts, loaders, 1)[0])
        # A network whose quantizers still let everything pass is not the best low-bit network.
        candidate = row.get("val_top1", -math.inf) if build.is_quantized(parts.model) else -math.inf
        best = candidate > progress.best_acc
        progress = state.RunState(
            epoch=epoch + 1,
            best_acc=max(progress.best_acc, candidate),
            policy=parts.steering.state_dict(),
            methods=parts.methods.state_dict(),
        )
        if recorder is not None:
            metrics.append(row)
            with parts.precision.autocast():
                recorder.epoch(row, lambda: audit_batches(parts, loaders, 1)[0], parts.logger)
        save(progress, best=best)
        parts.logger.info("%s", report.epoch_line(row, last, progress.best_acc))
    return progress, False


def train_one_epoch(
    parts: Parts, loader: Loader, start: RunState, stop: Stop, save: Callable[[RunState], None]
) -> tuple[RunState, bool]:
    """Train from `start` to the end of its epoch, or until a process was asked to stop.

    Returns how far it came, always with whole steps of the optimizer, and whether it was stopped.
    """
    from utils import distributed, finite, log, state
    from utils.progress import TrainingBar

    config, precision, settings, steering = parts.config, parts.precision, parts.config.run, parts.steering
    passes, batches = config.optim.iter_size, len(loader)
    together = config.data.batch_size * config.data.world_size  # images of a batch of all processes
    first = state.first_batch(start.position, together, passes, batches)
    totals = log.Totals(parts.device, state.sums_until(start.sums, start.position, first * together))
    stopped, vote, saved, reached = False, distributed.Vote(), first, start
    parts.model.train()
    loader.set_epoch(start.epoch)
    loader.set_position(first)
    precision.zero_grad()
    began = time.perf_counter()
    waited = log.Waiting(loader)
    last = config.schedule.epochs + config.schedule.extra_epoch
    bar = TrainingBar(
        waited, total=batches - first, later=(last - start.epoch - 1) * batches, images=together,
        device=parts.device, description=f"epoch {start.epoch + 1}/{last}", enabled=config.data.rank == 0,
    )  # fmt: skip
    for i, (images, target) in enumerate(bar, first):
        where = f"epoch {start.epoch + 1}, iteration {i + 1}"
        report = (i + 1) % settings.report_freq == 0 and i + 1 < batches  # the epoch has a line of its own
        # Looking costs nothing on the CPU; elsewhere it would wait for the device, so only reports look.
        look = parts.device.type == "cpu" or report or i + 1 == batches
        images, target = parts.images(images), target.to(parts.device, non_blocking=True)
        step = start.epoch * steering.rates.steps_per_epoch + i // passes
        if i % passes == 0 and steering.advance(start.epoch, step):
            start = dataclasses.replace(start, best_acc=-math.inf)
        if parts.probe is not None and i % passes == 0:
            parts.probe.begin(step)
        group_ends = (i + 1) % passes == 0 or i + 1 == batches
        with distributed.reduction(parts.network, now=group_ends):
            with precision.autocast():
                output = parts.network(images)
                loss = parts.methods.objective(output.float(), target, images, step)
            if look:
                finite.check_loss(parts, loss, images, where)
            # The last group of an epoch may be shorter; every group's gradient is a mean all the same.
            precision.backward(loss / min(passes, batches - i // passes * passes))
        if parts.probe is not None:
            parts.probe.end()
        totals.update(loss, output, target)
        if settings.delay > 0:
            time.sleep(settings.delay)
        if report:
            means = log.Totals.means(distributed.summed(totals.sums))
            parts.logger.info(
                "epoch %d, %d/%d: loss %.4f, top-1 %.2f, lr %.3g",
                start.epoch + 1, i + 1, batches, means["loss"], means["top1"], parts.optimizer.param_groups[0]["lr"],
            )  # fmt: skip
        if not group_ends:
            continue
        steering.rates.apply(parts.optimizer, step)
        norm = precision.gradient_norm(steering.optim.grad_clip)
        if look and not precision.scaling:
            finite.check_gradients(parts, norm, where)
        update = not steering.rates.skip_update(step)
        skipped = precision.step(update=update)
        if skipped:
            parts.logger.info("%s: %s", where, skipped)
        if update and not skipped:
            parts.methods.after_step(step, precision, parts.model)
        precision.zero_grad()

        stopped = vote(stop.asked != "")
        due = 0 < settings.save_every <= i + 1 - saved
        if stopped or due or i + 1 == batches:
            reached = dataclasses.replace(
                start,
                position=(i + 1) * together,
                sums=totals.values,
                seconds=start.seconds + time.perf_counter() - began,
                waited=start.waited + waited.seconds,
                policy=steering.state_dict(),
                methods=parts.methods.state_dict(),
            )
        if stopped:
            break
        if due:
            save(reached)
            saved = i + 1
    return reached, stopped


def train_row(parts: Parts, state: RunState) -> dict[str, float]:
    """The training's columns of the metrics, of an epoch that is at its end."""
    import torch

    from utils import distributed, log

    sums, rates = distributed.summed(torch.tensor(state.sums, dtype=torch.float64)), parts.steering.rates
    freezing = parts.methods.freezing
    return {
        "epoch": state.epoch + 1,
        "lr": rates.at(state.epoch * rates.steps_per_epoch),
        **{f"train_{name}": value for name, value in log.Totals.means(sums).items()},
        "seconds": state.seconds,
        "images_per_second": float(sums[-1]) / max(state.seconds, 1e-9),
        "data_wait": 100 * state.waited / max(state.seconds, 1e-9),
        **({"frozen": 100 * freezing.share()} if freezing.enabled else {}),
    }


def validation_row(parts: Parts, loaders: Loaders, epoch: int, stop: Stop) -> dict[str, float]:
    """The validation's columns of the metrics, after `epoch` (from 0): of the network and of its averaged weights."""
    from utils import distributed

    assert loaders.val is not None  # the caller has asked
    average, row = parts.methods.average, dict[str, float]()
    if average.exists:  # first, so that the norms' statistics are the network's own in the end
        with average.applied(parts.model):
            reestimate_norms(parts, loaders.train, epoch)
            distributed.share_state(parts.model)
            row |= {f"ema_{name}": value for name, value in validate(parts, loaders.val, stop).items()}
    reestimate_norms(parts, loaders.train, epoch)
    distributed.share_state(parts.model)
    return row | {f"val_{name}": value for name, value in validate(parts, loaders.val, stop).items()}


def validate(parts: Parts, loader: Loader, stop: Stop) -> dict[str, float]:
    """Loss and accuracy (percent) over a whole data set: `loss`, `top1`, `top5`.

    A process that is asked to stop leaves it early; the result then means nothing.
    """
    import torch
    from torch.nn import functional

    from utils import distributed, log
    from utils.progress import progress

    parts.model.eval()
    totals = log.Totals(parts.device)
    with torch.no_grad(), parts.precision.autocast():
        enabled = parts.config.data.rank == 0
        for images, target in progress(loader, len(loader), "validation", enabled=enabled):
            if stop.asked:
                break
            target = target.to(parts.device, non_blocking=True)
            output = parts.model(parts.images(images)).float()
            totals.update(functional.cross_entropy(output, target), output, target)
    return log.Totals.means(distributed.summed(totals.sums))


def reestimate_norms(parts: Parts, loader: Loader, epoch: int) -> None:
    """Compute the batch norms' statistics anew from the first `bn_batches` training batches of `epoch` (from 0)."""
    from model import batch_statistics

    count = parts.config.run.bn_batches
    if count == 0:
        return
    loader.set_epoch(epoch)
    loader.set_position(0)
    with parts.precision.autocast():
        batches = (parts.images(images) for images, _ in itertools.islice(loader, count))
        batch_statistics.reestimate(parts.model, batches)


def evaluate(parts: Parts, loaders: Loaders) -> int:
    """Validate, and audit when asked to; returns the exit status."""
    from model import audit

    assert loaders.val is not None  # checked with the options
    row = validation_row(parts, loaders, 0, Stop())
    for name, what in (("val", ""), ("ema", "averaged weights: ")):
        if f"{name}_loss" in row:
            top1, top5, loss = (row[f"{name}_{part}"] for part in ("top1", "top5", "loss"))
            parts.logger.info("%stop-1 %.2f, top-5 %.2f, loss %.4f", what, top1, top5, loss)
    if not parts.config.run.audit or parts.config.data.rank != 0:
        return 0
    with parts.precision.autocast():
        found = audit.audit(parts.model, audit_batches(parts, loaders), parts.config.model.quant)
    parts.logger.info("%s\naudit: %s", found.table(), found.verdict)
    return AUDIT_FAILED if found.problems else 0


def audit_batches(parts: Parts, loaders: Loaders, count: int = AUDIT_BATCHES) -> list[torch.Tensor]:
    """A few batches of real images, of the validation set where there is one."""
    loader = loaders.train if loaders.val is None else loaders.val
    return [parts.images(images) for images, _ in itertools.islice(loader, count)]


def start_processes(config: Config, argv: Sequence[str] | None) -> None:
    """Become the launcher of a process per GPU when several are asked for and this one stands alone."""
    ids = config.devices.ids
    if len(ids) < 2 or config.run.dry_run:
        return
    several = f"--device_ids {' '.join(map(str, ids))}: several GPUs take a process each"
    if "WORLD_SIZE" in os.environ or config.devices.distributed:
        if os.environ.get("WORLD_SIZE", str(config.devices.world_size)) == "1":
            raise UserError(f"{several}, and this is to be the only one: unset the variable WORLD_SIZE, and "
                            "leave out --distributed, or name one GPU")  # fmt: skip
        return
    if argv is not None:
        raise UserError(f"{several}; start main.py by itself")
    launcher = str(Path(__file__).with_name("launch.py"))
    options = ["--standalone", "--nproc_per_node", str(len(ids))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, launcher, *options, *sys.argv])


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


if __name__ == "__main__":
    sys.exit(main())
