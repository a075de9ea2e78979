"""What a dry run says of an assembled training, with the time of a step measured on a few images."""

from __future__ import annotations

import time

import torch

from model.convert import full_precision
from model.training.assemble import Assembled
from model.training.starting_point import Origin, Surroundings
from model.watch.accumulators import accumulators
from model.watch.peak import peak_bytes
from utils.checkpoint import run_state
from utils.config.image_size import sides
from utils.data.loader import Loader
from utils.data.loaders import Loaders
from utils.report.dry_run import Plan, duration
from utils.step import optimizer
from utils.text import counted, epochs_done, some_names

ENOUGH = 0.25  # seconds that a pass must take to be measured
LONG = 2.0  # seconds of a pass that needs no other
FEW = 2  # images of the first pass: the least for batch statistics


def plan_of(here: Surroundings, origin: Origin, assembled: Assembled) -> Plan:
    """The plan of a run, for `utils.report.dry_run.text`."""
    loaders, config = assembled.loaders, here.config

    def count(part: Loader | None) -> int:
        return 0 if part is None else part.samples

    spent, failure = ("", "") if config.run.lr_test else _time(here, assembled)
    return Plan(
        config=config,
        cost=assembled.cost,
        full_precision=full_precision(assembled.model),
        images=(count(loaders.training), count(loaders.val)),
        start=_start(here, origin, assembled),
        step_images=_step_images(here, assembled),
        time=spent,
        measured=not failure,
        classes=_classes(here, loaders),
        rates=assembled.policy.planned_rates,
        policy=assembled.policy.describe(assembled.initial),
        groups=optimizer.groups_table(assembled.groups),
        warnings=(*assembled.warnings, *[failure] * bool(failure)),
        folder=here.folder,
        checkpoints=here.files.folder,
        peak_bytes=peak_bytes(assembled.model, here.config.model.input_size, here.config.model.channels),
        accumulators=accumulators(assembled.model),
    )


def _start(here: Surroundings, origin: Origin, assembled: Assembled) -> str:
    """The weights that the run starts from, in words."""
    quant, found = here.config.model.quant, origin.found
    if found.path is not None:
        return f"{found.path}, {epochs_done(assembled.progress.epoch)}"
    start = "random weights"
    if assembled.loaded is not None:
        start = f"{assembled.loaded.source}: {assembled.loaded.summary()}"
    if here.config.run.resume:
        start += f" (--resume: no checkpoint of the case {here.config.run.case} yet)"
    searched = quant.enabled and quant.re_init and not here.config.run.evaluate
    if not searched:
        return start
    which = "values that are missing" if quant.re_init_missing else "clip values"
    option = "--re_init_missing" if quant.re_init_missing else "--re_init"
    return f"{start}; {which} from the weights and a batch ({option})"


def _classes(here: Surroundings, loaders: Loaders) -> str:
    """How classes of different sizes are evened out, in words; empty where they are not."""
    data = here.config.data
    said = []
    if data.balanced and loaders.training is not None:
        said.append("drawn equally often (--balanced_sampler)")
    if loaders.class_weights:
        pairs = zip(loaders.classes, loaders.class_weights, strict=True)
        weights = some_names(f"{name} {weight:.4g}" for name, weight in pairs)
        said.append(f"weights in the loss: {weights} (--class_weights {data.class_weights})")
    return "; ".join(said)


def _step_images(here: Surroundings, assembled: Assembled) -> int:
    """The images that each process has in a step; a set smaller than a batch gives a smaller one."""
    config, loader = here.config, assembled.loaders.training
    if loader is None:
        return 0
    size = min(config.data.batch_size, loader.samples // here.place.world_size)
    return size * min(config.optim.iter_size, len(loader))


def _time(here: Surroundings, assembled: Assembled) -> tuple[str, str]:
    """The estimated time of a step and of the rest of the run in words, and a warning where the pass fails."""
    config, device = here.config, here.device
    if here.place.world_size > 1 and config.devices.sync_bn:  # the other processes would have to take part
        return "not estimated with --sync_bn", ""
    what = "an image" if config.run.evaluate else "a step"
    try:
        image = _seconds_of_an_image(here, assembled)
    except RuntimeError as error:  # out of memory, for one
        return (
            "not known",
            f"{what} fails on {device}: {(str(error).splitlines() or [type(error).__name__])[0]}",
        )
    without = f"on {device}, without reading images"
    if config.run.evaluate:
        images = 0 if assembled.loaders.val is None else assembled.loaders.val.samples
        images //= here.place.world_size
        return f"estimated {duration(image * images)} for {counted(images, 'image')} {without}", ""
    step = image * _step_images(here, assembled)
    rates, state = assembled.policy.rates, assembled.progress
    done = run_state.next_step(state, config, rates.steps_per_epoch, len(assembled.loaders.train))
    steps = max(rates.total_steps - done, 0)
    which = f"the remaining {steps:,}" if done else f"all {steps:,}"
    return (
        f"estimated {duration(step)} a step, {duration(step * steps)} for {which} {without} or validation",
        "",
    )


def _seconds_of_an_image(here: Surroundings, assembled: Assembled) -> float:
    """Time forward and backward passes of growing batches of noise, until one takes long enough."""
    config, device, trains = here.config, here.device, not here.config.run.evaluate
    size, model = sides(config.model.input_size), assembled.model
    batch = (
        min(config.data.batch_size, _step_images(here, assembled)) if trains else config.data.val_batch_size
    )

    def passed(count: int) -> float:
        images = torch.randn(
            count, config.model.channels, *size, generator=torch.Generator().manual_seed(0)
        ).to(device, assembled.precision.image_dtype, memory_format=assembled.layout)
        target = torch.arange(count, device=device) % config.model.num_classes
        began = time.perf_counter()
        with assembled.precision.autocast(), torch.set_grad_enabled(trains):
            output = model(images).float()
            if trains:
                assembled.methods.objective(output, target, images, 0).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        model.zero_grad()
        return time.perf_counter() - began

    model.train(trains)
    count = min(FEW, batch)
    seconds = passed(count)  # the first pass of a process takes half a second more
    if seconds > LONG:
        return seconds / count
    while (seconds := passed(count)) < ENOUGH and count < batch:
        count = min(2 * count, batch)
    return seconds / count
