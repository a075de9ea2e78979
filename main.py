"""Train or evaluate a network: `python main.py --keyword ...`, usually through `bash train.sh CONFIG`.

The command line becomes one typed configuration before anything heavy is imported, so that `--help` and a user's
mistake answer at once. `run` then calls the stages of a run in their fixed order; each is a function below it.
Modules that import torch are imported inside the stages.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the middle of an import would leave a half-loaded module behind, or be lost.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"main.py: interrupted\n"), os._exit(130)))

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from utils.checkpoint.recorded import resolve
from utils.config import keyword
from utils.config.command_line import parse
from utils.config.schema import Config
from utils.errors import LostError, TrainingError, UserError
from utils.processes import launch, start
from utils.processes.interrupt import SAVED, Stop
from utils.step import schedule
from utils.text import epochs_done

if TYPE_CHECKING:
    from logging import Logger

    from model.training.assemble import Assembled
    from model.training.starting_point import Origin, Surroundings
    from model.training.training_state import TrainingState
    from model.watch.recorder import Recorder
    from utils.checkpoint.run_state import RunState
    from utils.data.loader import Loader
    from utils.data.loaders import Loaders
    from utils.report.epoch_files import MetricsFile
    from utils.report.tracking import Tracking

METRICS = (
    "epoch", "lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5",
    "ema_loss", "ema_top1", "ema_top5", "frozen", "seconds", "images_per_second", "data_wait",
)  # fmt: skip
AUDIT_FAILED = 3  # exit status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status.

    0: done; 1: failed; 2: a user's mistake; 3: trained, but the audit failed; 75: asked to end, and saved;
    130: interrupted before there was anything to save.
    """
    return launch.leave_status(answer(argv))


def answer(argv: Sequence[str] | None) -> int:
    """Run the program and print an error as one line; returns the exit status."""
    try:
        given = parse(sys.argv[1:] if argv is None else argv)
        if given["keyword_file"] is not None:
            keyword.load_file(given["keyword_file"])
        if given["list_keywords"]:
            print(keyword.table())
            return 0
        config = resolve(given)
        if not config.run.dry_run:
            start.process_per_gpu(config.devices, sys.argv if argv is None else None)
        return run(config)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            launch.wait_to_be_ended()  # nearly always the first process reports the same error
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, OSError) as error:  # OSError: a full disk, a folder that went away
        if isinstance(error, LostError) and "TORCHELASTIC_RUN_ID" in os.environ:
            # The run's exit status is that of the process that ended first; the launcher may be ending this one for it.
            if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Stop):
                return 1
            launch.wait_to_be_ended()
        print(f"main.py: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        return 130


# The stages of a run -------------------------------------------------------------------------------


def run(config: Config) -> int:
    """One run, from the configuration to the last epoch; returns the exit status."""
    start.check_options(config)
    from model.training.assemble import assemble  # imports torch; the checks above need not wait for it
    from model.training.starting_point import find_origin, find_surroundings
    from utils.checkpoint import earlier_runs
    from utils.processes import distributed
    from utils.report import log
    from utils.report.tracking import begun, tracked
    from utils.step.compiled import compiling

    here = find_surroundings(config)
    with distributed.joined(here.place, here.device):
        origin = find_origin(here)
        assembled = assemble(here, origin)
        if config.run.dry_run or config.run.lr_test:
            return describe(here, origin, assembled)
        # Nothing is written before this line, so that a mistake leaves no trace.
        writes = here.place.first and not config.run.evaluate
        tracker = begun(here.config, resumed=origin.found.path is not None)
        with (
            earlier_runs.prepared(
                here.folder, here.files, origin.found, config.run.resume_file, writes=writes
            ),
            log.opened(here.folder, here.place.rank, verbose=config.run.verbose) as logger,
            tracked(here.config, here.folder, logger, tracker) as tracking,
            compiling(config.precision),
        ):
            announce(here, origin, assembled, logger)
            training = assembled.training_state(here, logger)
            if config.run.evaluate:
                return evaluate(training, assembled.loaders)
            recorder = open_recorder(here, assembled, tracking)
            progress, stopped = train_until_stopped(here, origin, assembled, training, recorder)
            if stopped:
                return SAVED
            return 0 if recorder is None else finish(here, assembled, training, progress, recorder)


def describe(here: Surroundings, origin: Origin, assembled: Assembled) -> int:
    """Print the planned training (`--dry_run`), or the learning rates (the keyword `lr-test`)."""
    from model.training import planned
    from utils.report import dry_run

    if here.place.first:
        print(dry_run.text(planned.plan_of(here, origin, assembled)))
    return 0


def announce(here: Surroundings, origin: Origin, assembled: Assembled, logger: Logger) -> None:
    """Log the plan of the run, and the checkpoint that it starts from."""
    from model.convert import full_precision
    from model.layers.quantized import quantizers
    from utils.report import run_report

    config, found, progress, model = here.config, origin.found, assembled.progress, assembled.model
    for warning in assembled.warnings:
        logger.warning("warning: %s", warning)
    options = [(name, quantizer.config) for name, quantizer in quantizers(model) if quantizer.enabled]
    run_report.announce(
        config, assembled.cost, here.device, assembled.groups, options, full_precision(model), logger
    )
    if assembled.loaded is not None:
        logger.info("pretrained %s: %s", origin.pretrained, assembled.loaded.summary())
    if assembled.initialised:
        logger.info("re_init: initialised %d quantizers", assembled.initialised)
    if assembled.kept and found.path is None:
        logger.info("re_init_missing: %d quantizers keep what they have learned", assembled.kept)
    assembled.policy.log = logger.info
    if found.path is None:
        for change in (*assembled.initial, *(c for c in assembled.policy.plan if c.when == "init")):
            logger.info("%s", change)
    else:
        part = f" and {progress.position} images of the next" if progress.position else ""
        logger.info("resumed %s: %s", found.path, epochs_done(progress.epoch, part))
    if config.run.resume and found.path is None:
        logger.info("--resume: no checkpoint of the case %s yet, starting anew", config.run.case)


def evaluate(training: TrainingState, loaders: Loaders) -> int:
    """Validate, and audit when asked to; returns the exit status."""
    from model import audit
    from model.training import validation

    for line in validation.evaluation(training, loaders):
        training.logger.info("%s", line)
    if not training.config.run.audit or training.config.data.rank != 0:
        return 0
    with training.precision.autocast():
        batches = validation.audit_batches(training, loaders)
        found = audit.audit(training.model, batches, training.config.model.quant)
    training.logger.info("%s\naudit: %s", found.table(), found.verdict)
    return AUDIT_FAILED if found.problems else 0


def open_recorder(here: Surroundings, assembled: Assembled, tracking: Tracking) -> Recorder | None:
    """Open the first process's files beside log and checkpoints; returns None in other processes."""
    from model.watch.recorder import Recorder
    from utils.report import run_report

    config, progress, loaders = here.config, assembled.progress, assembled.loaders
    if not here.place.first:
        return None
    metrics_file(here).truncate_after(progress.epoch + 1)
    recorded = here.folder / "config.yaml"
    trains = progress.epoch < config.schedule.all_epochs
    if trains or not recorded.exists():  # a finished run keeps what it was trained with
        run_report.write_text(recorded, run_report.dump_yaml(config))
    recorder = Recorder(here.folder, assembled.model, config, progress.epoch, progress.position, tracking)
    if assembled.probe is not None:
        assembled.probe.board = recorder.board
    if config.run.tensorboard:
        loaders.train.set_epoch(progress.epoch)
        images, _ = next(iter(loaders.train))
        recorder.show(images, loaders.mean, loaders.std, progress.epoch)
    return recorder


def metrics_file(here: Surroundings) -> MetricsFile:
    """The file with one row of figures per epoch."""
    from utils.report.epoch_files import MetricsFile

    return MetricsFile(here.folder / "metrics.csv", METRICS)


def train_until_stopped(
    here: Surroundings,
    origin: Origin,
    assembled: Assembled,
    training: TrainingState,
    recorder: Recorder | None,
) -> tuple[RunState, bool]:
    """Train to the end of the run, or until a signal asks to stop; returns the state, and whether it was stopped.

    The state is on disk when this returns.
    """
    from utils.checkpoint import run_state
    from utils.checkpoint.archive import Writer
    from utils.processes import distributed

    if origin.found.path is not None:
        run_state.set_random(origin.found.payload, here.place.rank)
        origin.found.payload.clear()  # it has been taken over; the file's tensors need not stay in memory
    with launch.stop(training.logger.info, others=here.place.world_size > 1) as stop, Writer() as writer:
        output = run_state.Output(files=here.files, writer=writer, launchers=origin.launchers)
        save = partial(training.save, output=output)
        metrics = metrics_file(here)
        progress, stopped = train(
            training, assembled.loaders, assembled.progress, stop, save, metrics, recorder
        )
        writer.wait()
        if stopped:
            distributed.any_process(False)  # no process ends before the first one has written
            asked = stop.asked or "a process"
            training.logger.info("asked to end by %s: saved, -r goes on from here", asked)
    return progress, stopped


def finish(
    here: Surroundings, assembled: Assembled, training: TrainingState, progress: RunState, recorder: Recorder
) -> int:
    """Audit the trained network, write the run's summary and picture; returns the exit status."""
    from model import audit
    from model.training import validation
    from model.watch.cost import network_cost
    from utils.report import run_report

    config = here.config
    with training.precision.autocast():
        cost = network_cost(training.model, config.model.input_size, config.model.channels)  # a policy's bits
        batches = validation.audit_batches(training, assembled.loaders)
        found = audit.audit(training.model, batches, config.model.quant)
    summary = run_report.finish(config, cost, found, progress, here.folder, here.files, training.logger)
    recorder.finish(summary)
    return AUDIT_FAILED if found.problems else 0


# The loop ------------------------------------------------------------------------------------------


def train(
    training: TrainingState, loaders: Loaders, progress: RunState, stop: Stop, save: Callable[..., None],
    metrics: MetricsFile, recorder: Recorder | None,
) -> tuple[RunState, bool]:  # fmt: skip
    """Train from `progress` to the end of the run, or until a process was asked to stop.

    Args:
        training: the training.
        loaders: the images.
        progress: the state to start from.
        stop: whether this process was asked to end.
        save: writes a checkpoint of a state; with `best=True` also as the best one.
        metrics: gets one row per epoch, from the first process.
        recorder: writes the first process's other records; None in other processes.

    Returns:
        The last state, which is saved, and whether the run was stopped.
    """
    from model.networks import build
    from model.training import finite, validation
    from utils.checkpoint import run_state
    from utils.processes import distributed
    from utils.report import run_report

    config = training.config
    last = config.schedule.all_epochs
    for epoch in range(progress.epoch, last):
        progress, stopped = train_one_epoch(training, loaders.train, progress, stop, save)
        row = validation.train_row(training, progress)
        if loaders.val is not None and not stopped:
            began = time.perf_counter()
            row |= validation.validation_row(training, loaders, epoch, stop)
            row["seconds"] += time.perf_counter() - began
            stopped = stop.agree(distributed.any_process(stop.asked != ""))
        if stopped:
            save(progress)
            return progress, True
        finite.check_epoch(training, row, lambda: validation.audit_batches(training, loaders, 1)[0])
        # While the quantizers still pass values through unquantized, no accuracy counts as the best.
        candidate = row.get("val_top1", -math.inf) if build.is_quantized(training.model) else -math.inf
        best = candidate > progress.best_acc
        progress = run_state.RunState(
            epoch=epoch + 1,
            best_acc=max(progress.best_acc, candidate),
            policy=training.policy.state_dict(),
            methods=training.methods.state_dict(),
        )
        if recorder is not None:
            metrics.append(row)
            with training.precision.autocast():
                recorder.epoch(
                    row, lambda: validation.audit_batches(training, loaders, 1)[0], training.logger
                )
        save(progress, best=best)
        training.logger.info("%s", run_report.epoch_line(row, last, progress.best_acc))
    return progress, False


def train_one_epoch(
    training: TrainingState, loader: Loader, start: RunState, stop: Stop, save: Callable[[RunState], None]
) -> tuple[RunState, bool]:
    """Train from `start` to the end of its epoch, or until a process was asked to stop.

    Returns the last state, always after a whole optimizer step, and whether the run was stopped.
    """
    from model.training import finite
    from utils.checkpoint import run_state
    from utils.processes import distributed
    from utils.report.progress import TrainingBar
    from utils.step import meters

    config, precision, policy = training.config, training.precision, training.policy
    passes, batches = config.optim.iter_size, len(loader)
    global_batch = config.data.batch_size * config.data.world_size  # images of a batch of all processes
    first = run_state.first_batch(start.position, global_batch, passes, batches)
    totals = meters.Totals(
        training.device, run_state.sums_until(start.sums, start.position, first * global_batch)
    )
    stopped, vote, saved, reached = False, distributed.Vote(), first, start
    training.model.train()
    loader.set_epoch(start.epoch)
    loader.set_position(first)
    precision.zero_grad()
    began = time.perf_counter()
    waited = meters.Waiting(loader)
    last = config.schedule.all_epochs
    bar = TrainingBar(
        waited, total=batches - first, later=(last - start.epoch - 1) * batches, images=global_batch,
        device=training.device, description=f"epoch {start.epoch + 1}/{last}", enabled=config.data.rank == 0,
    )  # fmt: skip
    for i, (images, target) in enumerate(bar, first):
        where = f"epoch {start.epoch + 1}, iteration {i + 1}"
        report = (i + 1) % config.run.report_freq == 0 and i + 1 < batches  # the epoch's end has its own line
        # Checking for finite numbers is free on the CPU; on a GPU it waits for the device, so only reports check.
        check_now = training.device.type == "cpu" or report or i + 1 == batches
        images, target = training.images(images), target.to(training.device, non_blocking=True)
        step = start.epoch * policy.rates.steps_per_epoch + i // passes
        if i % passes == 0 and policy.advance(start.epoch, step):
            start = dataclasses.replace(start, best_acc=-math.inf)
        if training.probe is not None and i % passes == 0:
            training.probe.begin(step)
        group_ends = (i + 1) % passes == 0 or i + 1 == batches
        with distributed.reduction(training.network, now=group_ends):
            with precision.autocast():
                output = training.network(images)
                loss = training.methods.objective(output.float(), target, images, step)
            if check_now:
                finite.check_loss(training, loss, output, images, where)
            # The last group of an epoch may be shorter; its gradient is a mean, too.
            precision.backward(loss / min(passes, batches - i // passes * passes))
        if training.probe is not None:
            training.probe.end()
        totals.update(loss, output, target)
        if config.run.delay > 0:
            time.sleep(config.run.delay)
        if report:
            means = meters.Totals.means(distributed.summed(totals.sums))
            training.logger.info(
                "epoch %d, %d/%d: loss %.4f, top-1 %.2f, %s", start.epoch + 1, i + 1, batches, means["loss"],
                means["top1"], schedule.rate_text(policy.rates.taken(step)),
            )  # fmt: skip
        if not group_ends:
            continue
        policy.rates.apply(training.optimizer, step)
        norm = precision.gradient_norm(policy.optim.grad_clip, wanted=check_now)
        if check_now and norm is not None and not precision.scaling:
            finite.check_gradients(training, norm, where)
        update = not policy.rates.skip_update(step)
        skipped = precision.step(update=update)
        if skipped:
            training.logger.info("%s: %s", where, skipped)
        if update and not skipped:
            training.methods.after_step(step, precision, training.model)
        precision.zero_grad()

        stopped = stop.agree(vote(stop.asked != ""))
        due = 0 < config.run.save_every <= i + 1 - saved
        if stopped or due or i + 1 == batches:
            reached = dataclasses.replace(
                start,
                position=(i + 1) * global_batch,
                sums=totals.values,
                seconds=start.seconds + time.perf_counter() - began,
                waited=start.waited + waited.seconds,
                policy=policy.state_dict(),
                methods=training.methods.state_dict(),
            )
        if stopped:
            break
        if due:
            save(reached)
            saved = i + 1
    return reached, stopped


if __name__ == "__main__":
    sys.exit(main())
