"""The metrics of an epoch: of its training, and of its validation after batch norms are re-estimated."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional

from model.layers import batch_statistics
from model.training import finite
from model.training.reference import reference_logits
from model.training.training_state import TrainingState
from utils.checkpoint.run_state import RunState
from utils.data.loader import Loader
from utils.data.loaders import Loaders
from utils.processes import distributed
from utils.processes.interrupt import Stop
from utils.report.outcome import Outcome
from utils.report.progress import progress
from utils.step import meters

AUDIT_BATCHES = 4
METRICS = ("top1", "top5", "loss")


def train_row(training: TrainingState, state: RunState) -> dict[str, float]:
    """The training columns of the metrics, for a finished epoch."""
    sums, rates = distributed.summed(torch.tensor(state.sums, dtype=torch.float64)), training.policy.rates
    freezing = training.methods.freezing
    return {
        "epoch": state.epoch + 1,
        "lr": rates.first_taken(state.epoch),
        **{f"train_{name}": value for name, value in meters.Totals.means(sums).items()},
        "seconds": state.seconds,
        "images_per_second": float(sums[-1]) / max(state.seconds, 1e-9),
        "data_wait": 100 * state.waited / max(state.seconds, 1e-9),
        **({"frozen": 100 * freezing.share()} if freezing.enabled else {}),
    }


def validation_row(
    training: TrainingState, loaders: Loaders, epoch: int, stop: Stop, outcome: Outcome | None = None
) -> dict[str, float]:
    """The validation columns of the metrics after `epoch` (from 0), also for the averaged weights.

    `outcome` gets the predictions of the network's own weights.
    """
    assert loaders.val is not None  # the caller has checked
    average, row = training.methods.average, dict[str, float]()
    if average.exists:  # first, so that the norms' statistics are the network's own in the end
        with average.applied(training.model):
            reestimate_norms(training, loaders, epoch)
            distributed.share_state(training.model)
            row |= {f"ema_{name}": value for name, value in validate(training, loaders.val, stop).items()}
    reestimate_norms(training, loaders, epoch)
    distributed.share_state(training.model)
    return row | {
        f"val_{name}": value for name, value in validate(training, loaders.val, stop, outcome).items()
    }


def evaluation(training: TrainingState, loaders: Loaders) -> list[str]:
    """Validate, and write the predictions into the folder of the run; returns lines for the log."""
    assert loaders.val is not None and training.transform is not None  # checked with the options; assembled
    settings = training.config.run
    names = training.classes or tuple(map(str, range(training.config.model.num_classes)))
    outcome = Outcome(names, training.transform.mean, training.transform.std)
    row = validation_row(training, loaders, 0, Stop(), outcome)
    first = training.config.data.rank == 0
    written = outcome.write(settings.log_dir / settings.case, first=first, name=loaders.val.name)
    metrics = [
        what + meters.accuracy_text(*(row[f"{name}_{part}"] for part in METRICS))
        for name, what in (("val", ""), ("ema", "averaged weights: "))
        if f"{name}_loss" in row
    ]
    return metrics + written


def validate(
    training: TrainingState, loader: Loader, stop: Stop, outcome: Outcome | None = None
) -> dict[str, float]:
    """Loss and accuracy (percent) over a whole data set: `loss`, `top1`, `top5`.

    A process that is asked to stop returns early; the result then means nothing.

    Raises:
        TrainingError: a logit is NaN or infinite; in all processes.
    """
    training.model.eval()
    totals, batches = meters.Totals(training.device), list[torch.Tensor]()
    with torch.no_grad(), training.precision.autocast():
        enabled = training.config.data.rank == 0
        for images, target in progress(loader, len(loader), "validation", enabled=enabled):
            if stop.asked:
                break
            target = target.to(training.device, non_blocking=True)
            output = training.compiled(training.images(images)).float()
            if outcome is not None:
                outcome.update(images, target, output, reference_logits(training, images))
            totals.update(functional.cross_entropy(output, target), output, target)
            batches.append(output.isfinite().all())  # looked at in the end, so that the host need not wait
    finite.check_validation(training, batches, loader)
    if outcome is not None:
        outcome.numbers = loader.delivered
    return meters.Totals.means(distributed.summed(totals.sums))


def reestimate_norms(training: TrainingState, loaders: Loaders, epoch: int) -> None:
    """Re-estimate the batch norms' statistics from the first `bn_batches` training batches of `epoch` (from 0)."""
    count = training.config.run.bn_batches
    if count == 0:
        return
    loaders.train.set_epoch(epoch)
    loaders.train.set_position(0)
    with training.precision.autocast():
        batches = (training.images(images) for images, _ in itertools.islice(loaders.train, count))
        batch_statistics.reestimate(training.model, batches)


def audit_batches(
    training: TrainingState, loaders: Loaders, count: int = AUDIT_BATCHES
) -> list[torch.Tensor]:
    """A few batches of real images, of the validation set where there is one."""
    loader = loaders.train if loaders.val is None else loaders.val
    return [training.images(images) for images, _ in itertools.islice(loader, count)]
