"""Puts a run together: network, data, optimizer and policy, with the state of its checkpoint."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from logging import Logger

import torch
from torch import nn

from model import audit, calibrate
from model.layers import norms, sync_norm
from model.layers.quantized import quantizers
from model.networks import build
from model.pretrained import load_pretrained
from model.trained import check_as_trained, network_changed
from model.training.policy import Change, PolicyScheduler, initialise
from model.training.recompute import recompute_inputs
from model.training.reference import load_reference
from model.training.starting_point import Origin, Surroundings
from model.training.teacher import Teacher
from model.training.training_methods import TrainingMethods, build_training_methods
from model.training.training_state import TrainingState
from model.training.warmups import check_batches, fit_warmups
from model.watch.probe import Probe
from model.watch.trial import noise_images, run_once, unsuitable_inputs
from utils.checkpoint import run_state
from utils.checkpoint.case_files import Found
from utils.checkpoint.random_state import seed_generators
from utils.checkpoint.run_state import RunState
from utils.checkpoint.weights import (
    LoadReport,
    check_class_names,
    check_max_value,
    class_names_of,
    max_value_of,
    state_dict_of,
)
from utils.config.data_sets import FOLDER_SETS
from utils.config.schema import Config
from utils.data.loaders import Loaders
from utils.data.sources import open_data
from utils.data.transform import transform_of
from utils.processes import distributed
from utils.processes.agreement import check_agreement
from utils.report.cost_record import Cost
from utils.step import optimizer, precision
from utils.step.compiled import allow_many_graphs, compiled
from utils.step.optimizer import ParamGroup
from utils.step.precision import Precision
from utils.step.schedule import Schedule

RANDOM = "no checkpoint is given, so this evaluates random weights"
LEAST_IMAGES = 2  # of which norms have a deviation
SEEN_IMAGES = 8  # of a batch, whose inputs of layers are looked at before training


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A network with everything that its training needs, and reports of how it was built.

    Attributes:
        model: the network, on its device.
        layout: memory format of network and images.
        loaders: the images.
        optimizer: of the network's parameters, or of its master weights.
        groups: the optimizer's parameter groups.
        precision: the floating types it computes in.
        policy: applies the policy file; holds the learning rates.
        methods: the loss, averaged weights and frozen weights.
        probe: records tensors of layers, if asked to.
        progress: how far the run is.
        cost: of the network.
        initial: changes that the policy made before weights were loaded.
        loaded: the report on loading `--pretrained`; None without it.
        initialised: number of quantizers that `--re_init` initialised.
        kept: number of those that `--re_init_missing` left as they were loaded.
        warnings: all warnings.
        reference: an evaluation's other network; None without one.
    """

    model: nn.Module
    layout: torch.memory_format
    loaders: Loaders
    optimizer: torch.optim.Optimizer
    groups: list[ParamGroup]
    precision: Precision
    policy: PolicyScheduler
    methods: TrainingMethods
    probe: Probe | None
    progress: RunState
    cost: Cost
    initial: tuple[Change, ...]
    loaded: LoadReport | None
    initialised: int
    kept: int
    warnings: tuple[str, ...]
    reference: nn.Module | None

    def training_state(self, here: Surroundings, logger: Logger) -> TrainingState:
        """The state of the training loop; from here on the processes share gradients."""
        if self.loaders.class_weights:
            pairs = zip(self.loaders.classes, self.loaders.class_weights, strict=True)
            logger.info("class weights: %s", ", ".join(f"{name} {weight:.4g}" for name, weight in pairs))
        network = compiled(self.model, here.config.precision.compile)
        found = [quantizer for _, quantizer in quantizers(self.model)]
        if here.config.precision.kernels == "compiled" and found:
            allow_many_graphs()
            for quantizer in found:
                quantizer.generated = True
            logger.info(
                "%d quantizers run in kernels that torch.compile makes; first steps take longer", len(found)
            )
        return TrainingState(
            model=self.model,
            compiled=network,
            network=distributed.parallel(network, here.device, may_skip=self.policy.disables),
            optimizer=self.optimizer,
            precision=self.precision,
            policy=self.policy,
            methods=self.methods,
            device=here.device,
            layout=self.layout,
            config=here.config,
            logger=logger,
            probe=self.probe,
            classes=self.loaders.classes,
            max_value=self.loaders.max_value,
            transform=transform_of(here.config.data, self.loaders),
            reference=self.reference,
        )


def assemble(here: Surroundings, origin: Origin) -> Assembled:
    """Build the network, open the data, restore the state that the run continues from.

    The order is fixed: weights come before clip values, which are computed from them; clip values before the
    optimizer, which must hold the final parameters; the optimizer before its state.

    Raises:
        UserError: an option does not fit the network, the data or the checkpoint.
    """
    config, found = here.config, origin.found
    seed_generators(config.run.seed)
    model = build.build_network(config.model)
    initial = initialise(model, config.policy)
    loaded = None if origin.pretrained is None else load_pretrained(model, origin.pretrained, config)
    cost = run_once(model, config)
    teacher = None
    if config.loss.distill is not None and here.teacher is not None:
        teacher = Teacher(config.loss.distill, here.teacher)

    loaders, rates, shortened = _open_data(here, model)
    if loaded is not None:
        _check_same_data(config, loaders, loaded.classes, loaded.max_value, str(origin.pretrained))
    if teacher is not None:
        _check_same_data(config, loaders, teacher.classes, teacher.max_value, f"the teacher {here.teacher}")
    layout = precision.memory_format(model, config.precision, here.device)
    model.to(device=here.device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    kept = _loaded_quantizers(model, loaded) if config.model.quant.re_init_missing else frozenset()
    initialised, unsuitable, note = _initialise_ranges(here, origin, model, loaders, layout, kept)
    _join_processes(here, model)
    precision.prepare(model, config.precision)
    if config.precision.recompute:
        recompute_inputs(model)
    optimizer_, groups = optimizer.build_optimizer(model, config.optim)
    policy = PolicyScheduler(
        config.policy, model, optimizer_, groups, config.optim, rates, shortened=config.run.shortened
    )
    progress, changed = _resume(here, found, model, optimizer_, policy, loaders)
    probe = _probe(here, model, policy, loaders)
    arithmetic = precision.Precision(model, optimizer_, config.precision, here.device)
    with run_state.believing(found.path):
        arithmetic.load_state_dict(progress.amp)
    if teacher is not None:
        teacher.to(here.device, layout)
    methods = build_training_methods(config, model, teacher, policy.rates.total_steps, loaders.class_weights)
    with run_state.believing(found.path):
        methods.load_state_dict(progress.methods, model)
    idle = optimizer.idle_entries(model, config.optim)
    return Assembled(
        model=model,
        layout=layout,
        loaders=loaders,
        optimizer=optimizer_,
        groups=groups,
        precision=arithmetic,
        policy=policy,
        methods=methods,
        probe=probe,
        progress=progress,
        cost=dataclasses.replace(cost, note=note),
        initial=initial,
        loaded=loaded,
        initialised=initialised,
        kept=len(kept),
        reference=load_reference(config, loaders, here.device),
        warnings=(
            *config.warnings, *shortened, *idle, *here.warnings, *audit.unexplained(model), *unsuitable,
            *(() if config.run.evaluate else norms.untrained_statistics(model)), *policy.warnings, *changed,
            *loaders.warnings, *_unchecked(here, origin, loaded), *found.passed_over, *progress.differences,
            *([loaded.warning] if loaded is not None and loaded.warning else []),
            *(() if found.path or loaded or not config.run.evaluate else [RANDOM]),
        ),
    )  # fmt: skip


def _check_same_data(
    config: Config, loaders: Loaders, classes: tuple[str, ...], max_value: int | None, source: str
) -> None:
    """Raise `UserError` where a checkpoint was trained with other classes or another range of 16-bit images.

    A range that --max_value gives is wanted, and is not compared.
    """
    check_class_names(classes, loaders.classes, source)
    found = loaders.max_value if config.data.max_value is None else None
    check_max_value(max_value, found, source)


def _unchecked(here: Surroundings, origin: Origin, loaded: LoadReport | None) -> tuple[str, ...]:
    """A warning where the names of class folders cannot be compared with those of the checkpoint."""
    data, source, classes = here.config.data, str(origin.pretrained), () if loaded is None else loaded.classes
    if origin.found.path is not None:
        source, classes = str(origin.found.path), class_names_of(origin.found.payload)
    elif loaded is None or not here.config.run.evaluate:  # a training may be for other classes
        return ()
    if classes or data.dataset not in FOLDER_SETS:
        return ()
    return (
        f"{source} does not hold the names of its classes, so that nothing checks that they are the folders of "
        f"{data.root} in their order",
    )


def _open_data(here: Surroundings, model: nn.Module) -> tuple[Loaders, Schedule, tuple[str, ...]]:
    """Open the data and fit warm-ups to its epochs; returns loaders, learning rates and warnings."""
    config = here.config
    loaders = open_data(config.data, here.device, here.checked_data)
    check_agreement(loaders.identity)
    if loaders.training is None:
        # Evaluation uses no rate. No entry of a policy may seem to lie beyond the run: an epoch counts as endless.
        build.set_stable(model, 0)
        quant = config.model.quant
        assumed = any(part.stable_epoch > 0 for part in (quant.fm, quant.wt, quant.ot) if part.enable)
        warning = "--stable_epoch: without training images an epoch has no length, so it counts as over"
        return loaders, Schedule(config.schedule, config.optim.lr, 2**31), (warning,) * assumed
    check_batches(config, loaders.train.samples)
    build.set_stable(model, len(loaders.train))
    rates = Schedule(config.schedule, config.optim.lr, math.ceil(len(loaders.train) / config.optim.iter_size))
    return loaders, *fit_warmups(model, config, len(loaders.train), rates)


def _loaded_quantizers(model: nn.Module, loaded: LoadReport | None) -> frozenset[str]:
    """The names of the quantizers that the loaded weights hold, with all that they have learned."""
    names = frozenset() if loaded is None else frozenset(loaded.loaded)
    return frozenset(
        name
        for name, part in quantizers(model)
        if all(f"{name}.{each}" in names for each in part.state_dict())
    )


def _initialise_ranges(
    here: Surroundings, origin: Origin, model: nn.Module, loaders: Loaders, layout: torch.memory_format,
    kept: frozenset[str],
) -> tuple[int, tuple[str, ...], str]:  # fmt: skip
    """Initialise the quantizers' ranges from a batch if a new training asks for it, and look at their inputs.

    Those that are `kept` are left as they were loaded.

    Returns:
        How many quantizers were initialised, and what `unsuitable_inputs` found.
    """
    config, begins = here.config, origin.found.path is None and not here.config.run.evaluate
    quant = config.model.quant

    def batch() -> torch.Tensor | None:
        """The first images; None where this process has none."""
        source = loaders.val if config.run.evaluate and loaders.val is not None else loaders.train
        images, _ = next(iter(source), (None, None))
        return None if images is None else images.to(here.device, memory_format=layout)

    def others() -> torch.Tensor | None:
        """A few images where noise was looked at; None where there are too few for the statistics of a batch."""
        found = batch() if images is None else None
        return None if found is None or len(found) < LEAST_IMAGES else found[:SEEN_IMAGES]

    count, images, trains = 0, None, not (config.run.dry_run or config.run.lr_test)
    if quant.re_init and begins and trains:
        images = batch()
        assert images is not None  # a training has images on every process
        count = calibrate.initialise_ranges(model, images, quant, kept)
    noise = noise_images(config, loaders.mean, loaders.std).to(here.device, memory_format=layout)
    ranges = begins and (trains or not quant.re_init)
    seen = noise if images is None else images[:SEEN_IMAGES]
    warnings, note = unsuitable_inputs(model, seen, config, others, ranges=ranges)
    return count, warnings, note


def _join_processes(here: Surroundings, model: nn.Module) -> None:
    """Give all processes the same network, different random numbers and, if asked to, shared batch statistics."""
    distributed.share_state(model)
    if here.place.rank > 0:  # all ranks drew the same network; from here on each draws its own numbers
        seed_generators((here.config.run.seed + here.place.rank * 1_000_003) % 2**63)
    if here.config.devices.sync_bn and here.place.world_size > 1:
        sync_norm.synchronise(model, here.device)


def _resume(
    here: Surroundings, found: Found, model: nn.Module, optimizer_: torch.optim.Optimizer,
    policy: PolicyScheduler, loaders: Loaders,
) -> tuple[RunState, tuple[str, ...]]:  # fmt: skip
    """Restore the checkpoint that the run continues from; returns its progress, and warnings of changes."""
    config, steps_per_epoch = here.config, policy.rates.steps_per_epoch
    progress, warnings = RunState(), ()
    if found.path is not None:
        if config.run.evaluate:
            state = state_dict_of(found.payload, source=str(found.path))
            check_as_trained(found.payload, state, model, config, str(found.path))
        progress = run_state.restore(found.payload, found.path, model, optimizer_, config)
        classes, max_value = class_names_of(found.payload), max_value_of(found.payload)
        _check_same_data(config, loaders, classes, max_value, str(found.path))
        changed = run_state.schedule_change(found.payload, progress, config, steps_per_epoch)
        warnings = (changed,) * (changed != "" and not config.run.evaluate)
    if config.run.evaluate:  # which has no state of a policy
        return progress, warnings
    with run_state.believing(found.path):
        step = run_state.next_step(progress, config, steps_per_epoch, len(loaders.train))
        policy.load_state_dict(progress.policy, step)
        if network_changed(found.payload, model, config):  # accuracies before and after do not compare
            progress = dataclasses.replace(progress, best_acc=-math.inf)
    return progress, warnings


def _probe(here: Surroundings, model: nn.Module, policy: PolicyScheduler, loaders: Loaders) -> Probe | None:
    """The probe, in the first process of a training that asks for one."""
    config = here.config
    if not config.probe.enable or not here.place.first or config.run.evaluate:
        return None
    images = min(config.data.batch_size, loaders.train.samples)
    return Probe(model, config.probe, here.folder / "probe", steps=policy.rates.total_steps, images=images)
