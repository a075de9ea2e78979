"""The typed, frozen configuration of a run.

Words and strings end here: the command line (`utils.options`) and the keyword registry
(`utils.keyword`) become the dataclasses below, and no other code looks at a keyword again.
Every field is checked when the configuration is resolved, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import keyword as keywords
from utils import policy
from utils.errors import UserError
from utils.options import OLDER, OPTIONS, TAGS, Given, parse
from utils.policy import Rule

LEARNING = frozenset({"lsq", "pact", "lq", "fatnn"})  # methods that learn a range; PACT's weights do not


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """One tag's quantizer (`fm` activations, `wt` weights, `ot` outputs); see docs/quantizers.md."""

    tag: str
    enable: bool = False
    method: str = "none"
    levels: int = 256  # number of levels L; L - 1 steps
    half_range: bool = False  # levels in [0, c] instead of [-c, c]
    grid: str = "midrise"  # of a full range: "midtread" has a level at zero
    boundary: float = 1.0  # initial clipping value c
    scale: float = 0.5
    ratio: float = 1.0  # for methods of the user's own; no other reads it
    correlate: float = -1.0  # factor on the calibrated clip value; not used when <= 0
    quant_group: int | None = None  # groups that share parameters; -k means groups of k channels
    adaptive: str = "none"
    adaptive_restore: bool = False
    grad_type: str = "none"
    grad_scale: str = "none"
    gamma: bool = False  # a learned scale per output group
    binary_scale: bool = False  # DoReFa's one-bit weight: sign(w) * mean|w|
    custom: str = "none"  # XNOR-Net's activation scale: mean |x| over "channel" or "resolution"
    custom_update: bool = False  # LQ-Nets: the basis as a running mean
    closed_form: bool = False  # FATNN: a running least-squares scale on the result
    proxquant_step: int = 0  # training forwards over which the quantized value is blended in; 0: at once
    progressive: bool = False  # a policy that changes the levels keeps the step, not the clip value
    stable: int = 0  # training iterations that pass through unquantized while ranges are collected
    stable_epoch: int = 0  # the same in epochs; the longer of the two counts
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields of the user's own keywords


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """The quantizers of every convolution (and, on request, linear layer) of a network."""

    fm: QuantizerConfig = QuantizerConfig(tag="fm", half_range=True)
    wt: QuantizerConfig = QuantizerConfig(tag="wt")
    ot: QuantizerConfig = QuantizerConfig(tag="ot")
    padding_after_quant: bool = False
    re_init: bool = False
    re_init_range: str = "paper"  # how clip values are found: "paper", "mse" or "percentile"
    re_init_percentile: float = 99.9  # percent
    first_last: bool = False  # quantize the first and the last layer too
    depthwise: bool = True  # quantize depth-wise convolutions too

    @property
    def enabled(self) -> bool:
        """True when at least one tag quantizes."""
        return self.fm.enable or self.wt.enable or self.ot.enable


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The residual block: the order of a unit as data, and its skip connections."""

    order: str = "cbas"  # letters executed left to right: convolution, norm, activation, skip
    skip: str = "layer"  # "layer": around every convolution; "block": around the whole block
    fix: bool = False
    shortcut_pool: bool = True  # average pooling before the shortcut's convolution, not a stride
    shortcut_full_precision: bool = False
    shortcut_repeat: bool = False  # channels grow by concatenating copies, not by a convolution
    identity_norm: bool = False  # a norm on identity shortcuts
    zero_init: bool = False  # the last norm of a block starts at zero
    fixup: bool = False  # no norms, a multiplier per block and Fixup's initialisation
    fixup_bias: bool = False  # Fixup's scalar biases
    prone: bool = False  # 3x3 convolutions through space-to-depth
    prone_strided: bool = True  # the strided ones too
    prone_norm_inside: bool = False  # the norm before depth-to-space
    downsample_order: str = (
        ""  # layers (c, b, a) of a lossless downsampling before strided blocks; empty: none
    )


@dataclass(frozen=True, kw_only=True)
class StemConfig:
    """The layers before the first and after the last block."""

    kind: str = "imagenet"  # "imagenet": 7x7 stride 2 and pooling; "cifar": 3x3 stride 1
    space_to_depth: int = 0  # block of a space-to-depth stem; 4: no pooling, 2: pooling follows; 0: none
    kernel: int = 1  # of the space-to-depth stem's convolution
    norm_before_pool: bool = False
    activation: bool = True
    pre_norm: bool = False  # no norm in the stem, one norm before the final pooling
    pre_norm_activation: bool = (
        False  # an activation after that norm; with norm_before_pool the stem has its own too
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network: which one, its width and the parts above."""

    name: str = "resnet20"
    num_classes: int = 10
    input_size: int = 32  # pixels, height = width
    width_alpha: float = 1.0
    base: int = 1  # parallel branches of a block (Group-Net)
    norm: str = "batch"  # batch, static, frozen, reverse, instance or group
    activation: str = "relu"  # relu, none, prelu, relu6 or leaky
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields of the user's own keywords
    block: BlockConfig = BlockConfig()
    stem: StemConfig = StemConfig()
    quant: QuantConfig = QuantConfig()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are batched."""

    dataset: str = "digits"
    root: Path | None = None
    batch_size: int = 128  # images per iteration
    val_batch_size: int = 128  # 0: no validation
    workers: int = 2
    num_classes: int = 10
    input_size: int = 32
    mean: tuple[float, ...] | None = None  # per channel, of images in [0, 1]; None: the data set's own
    std: tuple[float, ...] | None = None
    fake_size: int = 256  # images of the `fake` training set; the validation set has a quarter
    seed: int = 0
    rank: int = 0  # number of this process of a distributed run, from 0
    world_size: int = 1  # its processes; `batch_size` is that of each
    colour: bool = False  # change the colours of training images
    rand_augment: int | None = None  # magnitude of RandAugment, 0 to 30; None: none
    mixup_alpha: float = 0.0  # parameter of Mixup's beta distribution; 0: no Mixup
    cutmix_alpha: float = 0.0  # the same of CutMix
    skip_corrupt: int = 0  # unreadable images that may be left out


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and the rules of its parameter groups."""

    name: str = "SGD"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_small: bool = False  # weight decay for one-dimensional and depth-wise weights too
    custom_decay_list: tuple[str, ...] = ()
    custom_decay: float = 0.0
    custom_lr_list: tuple[str, ...] = ()
    custom_lr: float = 0.0
    grad_clip: float | None = None  # largest norm of the whole gradient
    iter_size: int = 1  # forward and backward passes per optimizer step


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A full-precision teacher whose outputs the network learns, beside the labels."""

    teacher: ModelConfig = ModelConfig()
    pretrained: str = ""  # a path, or a name in weights_dir/TEACHER
    alpha: float = 0.5  # share of this loss; the labels' is 1 - alpha
    temperature: float = 4.0
    kind: str = "kl"  # or "mse"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What a training minimises."""

    label_smooth: float = 0.0
    focal_gamma: float = 0.0  # 0: cross-entropy
    focal_alpha: float = 1.0
    distill: DistillConfig | None = None
    quant_loss: float = 0.0  # factor on the relative quantization error of the weights
    dampen: float = 0.0  # factor on the dampening of oscillations, at the end of training


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """What is done with the weights after each step of the optimizer."""

    ema_decay: float = 0.0  # of averaged weights; 0: none
    freeze_threshold: tuple[float, ...] = ()  # oscillations a step that freeze a weight: from, to; none
    freeze_momentum: float = 0.01


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run."""

    policy: str = "custom_step"
    epochs: int = 10
    extra_epoch: int = 0  # epochs after the schedule's end, at its last rate
    decay: float = 0.1  # factor, or the power of `poly`
    eta_min: float = 0.0
    fix_step: int = 30  # epochs
    custom_step: tuple[int, ...] = ()  # epochs
    wakeup: int = 0  # iterations of linear warm-up from zero
    wakeup_epoch: int = 0
    warmup: int = 0  # iterations without an optimizer step
    warmup_epoch: int = 0


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """The floating types of a run; see `utils.precision`."""

    level: str = "O0"  # O0 float32, O1 autocast, O2 half weights with float32 masters, O3 all half
    dtype: str = "bfloat16"  # or float16
    backend: str = "torch"  # or apex
    tf32: bool = False
    channels_last: bool = True


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """The devices and processes of a run; None is what the environment says."""

    ids: tuple[int, ...] = ()
    distributed: bool = False
    world_size: int | None = None
    rank: int | None = None
    sync_bn: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is done, where results go."""

    case: str = "default"
    seed: int = 0
    evaluate: bool = False
    audit: bool = False
    dry_run: bool = False
    lr_test: bool = False
    resume: bool = False
    resume_file: Path | None = None
    pretrained: str | None = None  # a path, or a name in weights_dir/MODEL
    ema_weights: bool = False  # take the averaged weights of that checkpoint
    unresume_scope: tuple[str, ...] = ()
    weights_dir: Path = Path("weights")
    log_dir: Path = Path("exp")
    save_freq: int = 0  # epochs between checkpoints that are kept; 0: only the latest and the best
    save_every: int = 0  # iterations between saves of the latest checkpoint; 0: after epochs only
    keep: int = 2  # the latest checkpoint and those before it that stay
    report_freq: int = 50  # iterations between two lines of the log
    tensorboard: bool = False
    verbose: bool = False
    shortened: bool = False  # epochs or data were replaced on the command line: warm-ups shrink to fit
    bn_batches: int = 0  # training batches for batch norms' statistics before each validation; 0: as trained
    delay: float = 0.0  # seconds per iteration


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is looked into while a run trains; see `utils.probe`."""

    enable: bool = False
    layers: tuple[str, ...] = ()  # names or patterns; empty: every quantized layer
    images: tuple[int, ...] = (0,)  # of the batch
    iterations: tuple[int, ...] = ()  # of the run, from 0; empty: the first, the middle and the last one


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on. Built by `utils.config.resolve`, never by hand in the program."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    weights: WeightsConfig = WeightsConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    devices: DeviceConfig = DeviceConfig()
    run: RunConfig = RunConfig()
    probe: ProbeConfig = ProbeConfig()
    policy: tuple[Rule, ...] = ()
    keywords: tuple[str, ...] = ()
    origins: dict[str, str] = field(default_factory=dict)  # field -> the keyword or option that set it
    warnings: tuple[str, ...] = ()


# From options and keywords to the configuration --------------------------------------------------

DATASETS = {"digits": "digits", "glyphs": "glyphs", "cifar10": "cifar10", "cifar100": "cifar100",
            "imagenet": "imagenet", "dali": "imagenet"}  # --dataset -> its keyword  # fmt: skip
CLASSES = {"digits": 10, "glyphs": 62, "cifar10": 10, "cifar100": 100}  # of data sets whose classes are fixed


FAMILIES = ("resnet", "pytorch", "torchvision", "timm", "mobilenet", "classic")
CLASSICS = {"mobilenetv1": "mobilenet", "mobilenetv2": "mobilenet", "vgg_small": "classic", "nin": "classic"}


METHODS = ("dorefa", "pact", "lsq", "lq", "fatnn", "xnor")  # the project's own, without a user's

# Fields that keywords set and options override, so that the option is named as what set them.
FIELDS = {
    "num_classes": "model.num_classes",
    "input_size": "model.input_size",
    "label_smooth": "loss.label_smooth",
    "dataset": "data.dataset",
    "order": "block.downsample_order",
}


def family_of(model: str) -> str:
    """The family of networks whose keywords `model` understands; "own", whose words nobody knows, for a user's."""
    if model.startswith("pytorch-"):
        return "pytorch"
    source, colon, _ = model.partition(":")
    if colon and source in FAMILIES:
        return source
    return "resnet" if model.startswith("resnet") else CLASSICS.get(model, "own")


def read(argv: Sequence[str]) -> Config:
    """The configuration of a command line.

    Raises:
        UserError: for anything that cannot be meant, naming what to write instead.
        SystemExit: for `--help`.
    """
    given = parse(argv)
    if given["keyword_file"] is not None:
        keywords.load_file(given["keyword_file"])
    return resolve(given)


def resolve(given: Given) -> Config:
    """The typed configuration of parsed options; see `read`."""
    words = _data_keyword(given)
    resolution = keywords.resolve(words, family_of(given["model"]))
    fields = dict(resolution.fields)
    _check_numbers(given)
    quant, quant_warnings = quant_config(given, fields)
    model, model_warnings = model_config(given, fields, quant)
    schedule, schedule_warnings = _schedule_config(given)
    return Config(
        model=model,
        data=_data_config(given, fields, model),
        loss=_loss_config(given, words, fields, model),
        optim=_optim_config(given),
        weights=_weights_config(given, quant),
        schedule=schedule,
        precision=_precision_config(given),
        devices=_device_config(given),
        run=_run_config(given, fields),
        probe=_probe_config(given, fields),
        policy=() if given["policy"] in (None, "none") else policy.read(Path(given["policy"])),
        keywords=words,
        origins={name: f"keyword {word}" for name, word in resolution.origins.items()}
        | {FIELDS.get(name, name): f"--{name}" for name in sorted(given.explicit)},
        warnings=(
            *resolution.warnings,
            *quant_warnings,
            *model_warnings,
            *schedule_warnings,
            *_without_effect(given, fields),
        ),
    )


def _without_effect(given: Given, fields: Mapping[str, Any]) -> list[str]:
    """Warnings for options that were written and that nothing of this run reads."""
    policy = given["lr_policy"]
    dataset = given["dataset"] or fields.get("data.dataset", "digits")
    calibrates = bool(given["stable"] or given["stable_epoch"])
    idle = {
        "lr_fix_step": (policy != "fix_step", "without --lr_policy fix_step"),
        "eta_min": (policy not in ("poly", "sgdr", "sgdr_step", "cos"), f"with --lr_policy {policy}"),
        "momentum": (given["optimizer"].upper() == "ADAM", "with --optimizer ADAM"),
        "nesterov": (given["optimizer"].upper() == "ADAM", "with --optimizer ADAM"),
        "custom_lr": (not given["custom_lr_list"], "without --custom_lr_list"),
        "custom_decay": (not given["custom_decay_list"], "without --custom_decay_list"),
        "freeze_momentum": (not given["freeze_threshold"], "without --freeze_threshold"),
        "focal_alpha": (given["focal_gamma"] == 0, "without --focal_gamma"),
        "distill_loss_temperature": (given["distill_loss_type"] == "mse", "with --distill_loss_type mse"),
        "re_init_range": (not given["re_init"], "without --re_init"),
        "re_init_percentile": (given["re_init_range"] != "percentile", "without --re_init_range percentile"),
        "proxquant_step": ("quant.proxquant" not in fields, "without the keyword proxquant"),
        "unresume_scope": (given["pretrained"] is None, "without --pretrained"),
        "fake_size": (dataset != "fake", f"with the data set {dataset}"),
        "skip_corrupt": (dataset not in ("imagenet", "dali"), f"with the data set {dataset}"),
        "mixup_alpha": (not given["mixup_enable"], "without --mixup_enable"),
        "cutmix_alpha": (not given["cutmix_enable"], "without --cutmix_enable"),
        **{
            name: (bool(given["evaluate"]), "with --evaluate")
            for name in ("probe_list", "probe_index", "probe_iteration")
        },
        "order": ("block.downsample_order" not in fields, "without the keyword ReShapeResolution"),
        "root": (dataset in ("digits", "glyphs"), f"with the data set {dataset}, which needs no files"),
        **{f"{tag}_correlate": (not calibrates, "without --stable") for tag in TAGS},
        **{
            f"{tag}_adaptive_restore": (given[f"{tag}_adaptive"] == "none", f"without --{tag}_adaptive")
            for tag in TAGS
        },
        **{
            f"{tag}_ratio": (fields.get(f"quant.{tag}.method") in METHODS, "with the methods of this project")
            for tag in TAGS
        },
        **{option.name: (True, f"here: it is {option.help}") for group in OLDER.values() for option in group},
    }
    return [
        f"--{name} has no effect {when}"
        for name, (vain, when) in idle.items()
        if vain and name in given.explicit
    ]


def _data_keyword(given: Given) -> tuple[str, ...]:
    """The keywords, with the data set's own added when none is given.

    `fake` in place of another data set imitates that one.
    """
    words = tuple(dict.fromkeys(given["keyword"]))
    present = [word for word in words if word in DATASETS.values()]
    dataset = given["dataset"] or (present[0] if present else "digits")
    if dataset == "fake":
        replaced = [name for name in given.replaced.get("dataset", ()) if name != "fake"]
        if not present and replaced:
            return (DATASETS[replaced[-1]], *words)
        if not present and (given["num_classes"] is None or given["input_size"] is None):
            raise UserError(
                "--dataset fake: say which images to imitate with one of the keywords "
                f"{', '.join(sorted(set(DATASETS.values())))}, or give --num_classes and --input_size"
            )
        return words
    wanted = DATASETS[dataset]
    if len(present) == 1 and present != [wanted]:
        raise UserError(
            f"--dataset {dataset} contradicts the keyword {present[0]}: write {wanted} or leave it out"
        )
    return words if present else (wanted, *words)


def _positive(given: Given, *names: str) -> None:
    for name in names:
        if given[name] is not None and not 0 < given[name] < math.inf:
            raise UserError(f"--{name} {given[name]}: must be a number greater than 0")


def _not_negative(given: Given, *names: str) -> None:
    for name in names:
        if given[name] is not None and not 0 <= given[name] < math.inf:
            raise UserError(f"--{name} {given[name]}: must be a number that is not negative")


def _share(given: Given, *names: str) -> None:
    for name in names:
        if given[name] is not None and not 0 <= given[name] < 1:
            raise UserError(f"--{name} {given[name]}: must be at least 0 and less than 1")


def _check_numbers(given: Given) -> None:
    """Values that make no sense whatever else is given."""
    _positive(
        given, "batch_size", "epochs", "iter_size", "num_classes", "input_size", "width_alpha", "base",
        "report_freq", "keep", "fake_size", "grad_clip", "custom_lr", "lr_fix_step", "mixup_alpha", "cutmix_alpha",
        "focal_alpha", "distill_loss_temperature", "distill_width_alpha",
        *(f"{tag}_{name}" for tag in TAGS for name in ("boundary", "scale")),
    )  # fmt: skip
    _not_negative(
        given, "val_batch_size", "workers", "lr", "weight_decay", "custom_decay", "extra_epoch", "eta_min",
        "wakeup", "wakeup_epoch", "warmup", "warmup_epoch", "stable", "stable_epoch", "save_freq", "delay", "lr_decay",
        "save_every", "skip_corrupt", "bn_batches", "focal_gamma", "quant_loss", "dampen",
    )  # fmt: skip
    _share(given, "momentum", "label_smooth", "ema_decay")
    _check_methods(given)
    if given["rand_augment"] is not None and not 0 <= given["rand_augment"] <= 30:
        raise UserError(f"--rand_augment {given['rand_augment']}: must be from 0 to 30")
    if given["batch_size"] == 1 and not given["evaluate"]:
        raise UserError("--batch_size 1: batch statistics need at least 2 images")
    if given["resume"] and given["resume_file"] is not None:
        raise UserError("--resume contradicts --resume_file: keep one of them")
    if given["custom_lr_list"] and given["custom_lr"] is None:
        raise UserError("--custom_lr_list needs --custom_lr RATE")
    if "proxquant_step" in given.explicit and given["proxquant_step"] <= 0:
        raise UserError(f"--proxquant_step {given['proxquant_step']}: must be greater than 0")
    if (given["mean"] is None) != (given["std"] is None):
        raise UserError("--mean and --std belong together: give both or neither")
    for name in ("mean", "std"):
        if given[name] is not None and len(given[name]) != 3:
            raise UserError(f"--{name}: give three numbers, one per channel, like 0.5,0.5,0.5")
        if given[name] is not None and not all(map(math.isfinite, given[name])):
            raise UserError(f"--{name}: give finite numbers")
    if given["std"] is not None and min(given["std"]) <= 0:
        raise UserError("--std: must be greater than 0")
    for tag in TAGS:
        if not math.isfinite(given[f"{tag}_correlate"]):
            raise UserError(f"--{tag}_correlate {given[f'{tag}_correlate']}: give a finite number")
    if not 0 <= given["seed"] < 2**63:
        raise UserError(f"--seed {given['seed']}: must be from 0 to 2^63 - 1")
    if given["evaluate"] and given["val_batch_size"] == 0:
        raise UserError("--evaluate needs validation images: give a --val_batch_size above 0")


def _check_methods(given: Given) -> None:
    """Numbers of the training methods that make no sense whatever else is given."""
    threshold = given["freeze_threshold"]
    if "freeze_threshold" in given.explicit and (
        len(threshold) not in (1, 2) or not all(0 < value < 1 for value in threshold)
    ):
        raise UserError("--freeze_threshold: give one number between 0 and 1, or two, like 0.04,0.01")
    if not 0 < given["freeze_momentum"] < 1:
        raise UserError(f"--freeze_momentum {given['freeze_momentum']}: must be between 0 and 1")
    if not 0 < given["distill_loss_alpha"] <= 1:
        raise UserError(
            f"--distill_loss_alpha {given['distill_loss_alpha']}: must be above 0 and at most 1, which leaves the "
            "labels out"
        )
    if not 0 < given["re_init_percentile"] <= 100:
        raise UserError(
            f"--re_init_percentile {given['re_init_percentile']}: must be above 0 and at most 100"
        )
    if given["ema_weights"] and given["pretrained"] in (None, "none"):
        raise UserError("--ema_weights needs a checkpoint that has them: give --pretrained")


def quant_config(given: Given, fields: Mapping[str, Any]) -> tuple[QuantConfig, tuple[str, ...]]:
    """The quantizers of options and keyword fields, and warnings about what has no effect."""
    warnings: list[str] = []
    parts = {tag: _quantizer_config(tag, given, fields, warnings) for tag in TAGS}
    quant = QuantConfig(
        **parts,
        padding_after_quant=bool(given["padding_after_quant"]),
        re_init=bool(given["re_init"]),
        re_init_range=given["re_init_range"],
        re_init_percentile=given["re_init_percentile"],
        first_last=bool(fields.get("quant.first_last", False)),
        depthwise=bool(fields.get("quant.depthwise", True)),
    )
    clips = {"fm": {"lsq", "pact", "dorefa"}, "wt": {"lsq"}, "ot": {"lsq", "pact", "dorefa"}}
    searching = quant.re_init_range != "paper"
    clipping = any(part.enable and part.method in clips[tag] for tag, part in parts.items())
    if quant.re_init and quant.enabled and searching and not clipping:
        warnings.append(
            f"--re_init_range {quant.re_init_range} has no effect: no quantizer has a clipping value"
        )
    learns = {"fm": LEARNING, "wt": LEARNING - {"pact"}, "ot": LEARNING}
    learning = any(part.enable and part.method in learns[tag] for tag, part in parts.items())
    learning |= searching and clipping
    if quant.re_init and quant.enabled and not learning:
        warnings.append("--re_init has no effect: no quantizer of this network learns its range")
    if not quant.enabled:
        for name in ("padding_after_quant", "re_init", "stable", "stable_epoch"):
            if name in given.explicit:
                warnings.append(
                    f"--{name} has no effect: nothing is quantized, see --fm_enable and --wt_enable"
                )
        if any(part.method != "none" for part in parts.values()):
            warnings.append(
                "the network stays in full precision: add --fm_enable and --wt_enable to quantize it"
            )
    return quant, tuple(warnings)


def _quantizer_config(
    tag: str, given: Given, fields: Mapping[str, Any], warnings: list[str]
) -> QuantizerConfig:
    bit, level = given[f"{tag}_bit"], given[f"{tag}_level"]
    enable = bool(given[f"{tag}_enable"])
    if not 1 <= bit <= (16 if enable else 32):  # 32 says "full precision" in configs that enable one tag only
        raise UserError(
            f"--{tag}_bit {bit}: must be from 1 to 16; leave --{tag}_enable out for full precision"
        )
    if level is not None and not 2 <= level <= 2**16:
        raise UserError(f"--{tag}_level {level}: must be from 2 to 65536 (3 is ternary)")
    if level is not None and f"{tag}_bit" in given.explicit and level > 2**bit:
        raise UserError(f"--{tag}_level {level} does not fit --{tag}_bit {bit}, which has {2**bit} levels")
    method = fields.get(f"quant.{tag}.method", "none")
    if enable and method == "none":
        raise UserError(
            f"--{tag}_enable: which quantizer? Add one of the keywords dorefa,lsq, pact, dorefa, lq, "
            "dorefa,non-uniform or xnor to --keyword"
        )
    if not enable:
        written = sorted(name for name in given.explicit if name.startswith(f"{tag}_"))
        warnings.extend(f"--{name} has no effect without --{tag}_enable" for name in written)
    if given[f"{tag}_quant_group"] == 0:
        raise UserError(f"--{tag}_quant_group 0: give the number of groups, or -k for groups of k channels")
    levels = 2**bit if level is None else level
    if method == "xnor" and level is None and f"{tag}_bit" not in given.explicit:
        levels = 2
    binary_scale = bool(fields.get(f"quant.{tag}.binary_scale", False))
    if enable:
        _check_method(tag, method, levels, binary_scale, given, fields, warnings)
    half_default = tag == "fm"
    return QuantizerConfig(
        tag=tag,
        enable=enable,
        method=method,
        levels=levels,
        half_range=half_default != bool(given[f"{tag}_half_range"]),
        grid=given[f"{tag}_grid"],
        boundary=given[f"{tag}_boundary"],
        scale=given[f"{tag}_scale"],
        ratio=given[f"{tag}_ratio"],
        correlate=given[f"{tag}_correlate"],
        quant_group=given[f"{tag}_quant_group"],
        adaptive=given[f"{tag}_adaptive"],
        adaptive_restore=bool(given[f"{tag}_adaptive_restore"]) or method == "lq",
        grad_type=given[f"{tag}_grad_type"],
        grad_scale=given[f"{tag}_grad_scale"],
        gamma=bool(fields.get(f"quant.{tag}.gamma", False)),
        binary_scale=binary_scale,
        custom=given["fm_custom"] if tag == "fm" else "none",
        custom_update=bool(fields.get("quant.custom_update", False)),
        closed_form=bool(fields.get("quant.closed_form", False)),
        proxquant_step=given["proxquant_step"] if "quant.proxquant" in fields else 0,
        progressive=bool(fields.get("quant.progressive", False)),
        stable=given["stable"],
        stable_epoch=given["stable_epoch"],
        extra=_extra(fields),
    )


def _check_method(
    tag: str, method: str, levels: int, binary_scale: bool, given: Given, fields: Mapping[str, Any],
    warnings: list[str],
) -> None:  # fmt: skip
    """Options that contradict an enabled quantizer's method, or have no effect on it."""
    kind = given[f"{tag}_grad_type"]
    if binary_scale and levels != 2:
        raise UserError(f"the keyword {tag}_bin needs --{tag}_bit 1, not {levels} levels")
    if method == "xnor" and levels != 2:
        raise UserError(f"the keyword xnor is binary: give --{tag}_bit 1, not {levels} levels")
    if kind == "Triangle" and (method != "xnor" or tag == "wt"):
        raise UserError(
            f"--{tag}_grad_type Triangle belongs to binary activations; write none, STE or STE-scale"
        )
    if kind == "STE-scale" and method not in ("dorefa", "pact", "lsq"):
        raise UserError(f"--{tag}_grad_type STE-scale does not go with {method}; write none or STE")
    if kind == "STE-scale" and method == "lsq":
        warnings.append(f"--{tag}_grad_type STE-scale has no effect with lsq, which rounds a clamped value")
    if given[f"{tag}_grid"] == "midtread":
        if method != "lsq":
            raise UserError(f"--{tag}_grid midtread belongs to lsq, not to {method}")
        if (tag == "fm") != bool(given[f"{tag}_half_range"]):
            raise UserError(f"--{tag}_grid midtread needs a full range: change --{tag}_half_range")
        if levels < 3:
            raise UserError(f"--{tag}_grid midtread has no level above zero at {levels} levels; use midrise")
    if tag == "fm" and given["fm_custom"] != "none" and method != "xnor":
        raise UserError(f"--fm_custom belongs to the keyword xnor, not to {method}")
    if f"{tag}_half_range" in given.explicit:
        if tag == "wt" and method == "fatnn":
            raise UserError("--wt_half_range: FATNN's weights are ternary, -1, 0 and 1; leave it out")
        if method == "xnor" or (tag == "wt" and method in ("dorefa", "pact")):
            warnings.append(f"--{tag}_half_range has no effect with {method}, whose levels are symmetric")
    learned = {"lsq", "pact", "dorefa", "fatnn"} if tag != "wt" else {"lsq"}
    if f"{tag}_boundary" in given.explicit and method not in learned:
        warnings.append(f"--{tag}_boundary has no effect with {method}, which has no clipping value")
    if given[f"{tag}_grad_scale"] != "none" and (
        method not in ("lsq", "pact") or (tag, method) == ("wt", "pact")
    ):
        warnings.append(f"--{tag}_grad_scale has no effect with {method}, which learns no clipping value")
    whole_weight = tag == "wt" and method in ("dorefa", "pact")  # one maximum or mean of the tensor
    by_group = "quant.wt.gamma" in fields or given["wt_adaptive"] != "none"
    if whole_weight and "wt_quant_group" in given.explicit and not by_group:
        warnings.append(f"--wt_quant_group has no effect with {method}, whose weights share one range")
    scaled = given[f"{tag}_grad_scale"] not in ("none", "paper")
    if f"{tag}_scale" in given.explicit and method not in ("fatnn", "lq") and not scaled:
        warnings.append(f"--{tag}_scale has no effect with {method} without --{tag}_grad_scale")
    if "quant.custom_update" in fields and method != "lq":
        warnings.append(f"the keyword custom-update has no effect on {tag}, which is not quantized by lq")
    if "quant.closed_form" in fields and method != "fatnn":
        warnings.append(f"the keyword closed_form has no effect on {tag}, which is not quantized by FATNN")


def _extra(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("extra."): value for name, value in fields.items() if name.startswith("extra.")}


def _part(cls: type[Any], prefix: str, fields: Mapping[str, Any]) -> Any:
    """A dataclass from the fields that begin with `prefix`."""
    names = {item.name for item in dataclasses.fields(cls)}
    return cls(**{name: fields[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in fields})


def model_config(
    given: Given, fields: Mapping[str, Any], quant: QuantConfig
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The network of options and keyword fields, and warnings."""
    family = family_of(given["model"])
    resnet = family == "resnet"
    orders = [k.name for k in keywords.registry().values() if "block.order" in k.sets]
    if resnet and quant.enabled and "block.order" not in fields:
        raise UserError(
            f"--keyword: a quantized network needs the order of its units, one of {', '.join(orders)}"
        )
    block = _part(BlockConfig, "block", fields)
    stem = _part(StemConfig, "stem", fields)
    _check_variants(given, block, stem)
    if given["order"] is not None and block.downsample_order:
        block = dataclasses.replace(block, downsample_order=given["order"])
    stem = dataclasses.replace(stem, kernel=given["stem_kernel"] or 1)
    size = given["input_size"] or fields.get("model.input_size", 32)
    if "stem.kind" not in fields:  # only `fake` comes without a data set's keyword
        stem = dataclasses.replace(stem, kind="imagenet" if size >= 128 else "cifar")
    warnings = []
    if resnet and block.order.startswith("b") and not stem.pre_norm:
        warnings.append(
            f"{block.order} without the keyword preBN leaves the last block's output unnormalised"
        )
    if (
        family in ("torchvision", "timm")
        and quant.fm.enable
        and quant.fm.half_range
        and quant.fm.method != "xnor"
    ):
        warnings.append(
            "the activations' levels start at zero, which suits networks of ReLUs: give --fm_half_range for one whose "
            "layers get negative inputs (GELU, SiLU, layer norms)"
        )
    if given["base"] > 1 and family not in ("resnet", "own"):
        raise UserError(f"--base {given['base']}: {given['model']} has no branches; use a resnet")
    model = ModelConfig(
        name=given["model"],
        num_classes=given["num_classes"] or fields.get("model.num_classes", 10),
        input_size=size,
        width_alpha=given["width_alpha"],
        base=given["base"],
        block=block,
        stem=stem,
        norm=fields.get("model.norm", "batch"),
        activation=fields.get("model.activation", "relu6" if given["model"] == "mobilenetv2" else "relu"),
        quant=quant,
        extra=_extra(fields),
    )
    return model, tuple(warnings)


def _check_variants(given: Given, block: BlockConfig, stem: StemConfig) -> None:
    """Combinations of network variants that have no network."""
    order, kernel = given["order"], given["stem_kernel"]
    if order is not None and (set(order) - set("cba") or len(set(order)) != len(order) or "c" not in order):
        raise UserError(
            f"--order {order}: write each of the letters c, b and a at most once, with a c, like cb"
        )
    if kernel is not None:
        if not stem.space_to_depth:
            raise UserError("--stem_kernel belongs to the keywords TResNetStem and TResNetStemMaxPool")
        if kernel not in (1, 3):
            raise UserError(f"--stem_kernel {kernel}: must be 1 or 3")
    if block.prone_norm_inside and not block.order.startswith("cb"):
        raise UserError(
            f"--keyword: bn_before_restore needs an order in which the norm follows the convolution, "
            f"cbas or cbsa, not {block.order}"
        )
    if block.fixup and block.order.startswith("b"):
        raise UserError(
            f"--keyword: fixup has no norms to begin with, so {block.order} cannot be; use cbas or cbsa"
        )


def _data_config(given: Given, fields: Mapping[str, Any], model: ModelConfig) -> DataConfig:
    dataset = given["dataset"] or fields["data.dataset"]
    classes = CLASSES.get(dataset, model.num_classes)
    if classes != model.num_classes and given["dataset"] is not None:
        raise UserError(f"--num_classes {model.num_classes}: {dataset} has {classes} classes; leave it out")
    batch = given["batch_size"]
    return DataConfig(
        dataset=dataset,
        root=None if given["root"] is None else Path(given["root"]),
        batch_size=batch,
        val_batch_size=batch if given["val_batch_size"] is None else given["val_batch_size"],
        workers=given["workers"],
        num_classes=model.num_classes,
        input_size=model.input_size,
        mean=given["mean"],
        std=given["std"],
        fake_size=given["fake_size"],
        seed=given["seed"],
        colour=bool(given["addition_augment"]),
        rand_augment=given["rand_augment"],
        mixup_alpha=given["mixup_alpha"] if given["mixup_enable"] else 0.0,
        cutmix_alpha=given["cutmix_alpha"] if given["cutmix_enable"] else 0.0,
        skip_corrupt=given["skip_corrupt"],
    )


def _loss_config(
    given: Given, words: tuple[str, ...], fields: Mapping[str, Any], model: ModelConfig
) -> LossConfig:
    smooth = given["label_smooth"]
    for name in ("quant_loss", "dampen"):
        if given[name] > 0:
            _check_levels_are_weights(f"--{name} {given[name]}", model.quant)
    return LossConfig(
        label_smooth=fields.get("loss.label_smooth", 0.0) if smooth is None else smooth,
        focal_gamma=given["focal_gamma"],
        focal_alpha=given["focal_alpha"],
        distill=_distill_config(given, words, model),
        quant_loss=given["quant_loss"],
        dampen=given["dampen"],
    )


def _distill_config(given: Given, words: tuple[str, ...], model: ModelConfig) -> DistillConfig | None:
    """The teacher, a full-precision network of the same data, and how it is learned from."""
    name, source = given["distill_teacher"], given["distill_pretrained"]
    if name == "none":  # takes a config's teacher back
        return None
    if name is None:
        others = [option for option in OPTIONS if option.startswith("distill_") and option in given.explicit]
        others = [option for option in others if option != "distill_teacher"]
        if others:
            raise UserError(f"--{others[0]} needs a teacher: give --distill_teacher MODEL or leave it out")
        return None
    if source in (None, "none"):
        raise UserError("--distill_teacher needs its weights: give --distill_pretrained CHECKPOINT")
    theirs = given["distill_keyword"]
    if theirs is None:
        theirs = tuple(word for word in words if keywords.registry()[word].group != "quantizer")
    if not set(theirs) & set(DATASETS.values()):
        theirs = (*(word for word in words if word in DATASETS.values()), *theirs)
    options = {
        "model": name,
        "width_alpha": given["distill_width_alpha"] or given["width_alpha"],
        **{name: given[name] for name in ("num_classes", "input_size") if name in given.explicit},
    }
    try:
        fields = keywords.resolve(theirs, family_of(name)).fields
        teacher, _ = model_config(Given(options), fields, QuantConfig())
    except UserError as error:
        raise UserError(
            f"--distill_teacher {name}: {error}; its own keywords are --distill_keyword"
        ) from error
    if teacher.num_classes != model.num_classes:
        raise UserError(
            f"--distill_teacher {name} has {teacher.num_classes} classes, the network {model.num_classes}: "
            "give --distill_keyword the same data set"
        )
    return DistillConfig(
        teacher=teacher,
        pretrained=source,
        alpha=given["distill_loss_alpha"],
        temperature=given["distill_loss_temperature"],
        kind=given["distill_loss_type"],
    )


def _check_levels_are_weights(option: str, quant: QuantConfig) -> None:
    """Refuse what compares weights with their levels where these are values of another kind."""
    weights = quant.wt
    if not weights.enable:
        raise UserError(f"{option}: no weight is quantized; add --wt_enable or leave it out")
    squashed = weights.method in ("dorefa", "pact") and not weights.binary_scale
    if squashed or weights.method == "fatnn":
        raise UserError(
            f"{option}: the levels of {weights.method} are of another scale than the weights; use lsq, lq or xnor"
        )
    if weights.adaptive != "none" and not weights.adaptive_restore:
        raise UserError(
            f"{option}: --wt_adaptive {weights.adaptive} leaves the levels at another scale than the weights; "
            "add --wt_adaptive_restore"
        )


def _weights_config(given: Given, quant: QuantConfig) -> WeightsConfig:
    threshold = given["freeze_threshold"]
    if threshold:
        written = ",".join(map(str, threshold))
        _check_levels_are_weights(f"--freeze_threshold {written}", quant)
        if quant.wt.adaptive != "none":
            raise UserError(
                f"--freeze_threshold {written}: frozen weights would move with --wt_adaptive's mean"
            )
    return WeightsConfig(
        ema_decay=given["ema_decay"], freeze_threshold=threshold, freeze_momentum=given["freeze_momentum"]
    )


def _optim_config(given: Given) -> OptimConfig:
    return OptimConfig(
        name=given["optimizer"],
        lr=given["lr"],
        momentum=given["momentum"],
        nesterov=bool(given["nesterov"]) and given["optimizer"].upper() != "ADAM",
        weight_decay=given["weight_decay"],
        decay_small=bool(given["decay_small"]),
        custom_decay_list=given["custom_decay_list"],
        custom_decay=given["custom_decay"] if given["custom_decay_list"] else 0.0,
        custom_lr_list=given["custom_lr_list"],
        custom_lr=given["custom_lr"] if given["custom_lr_list"] else 0.0,
        grad_clip=given["grad_clip"],
        iter_size=given["iter_size"],
    )


def _schedule_config(given: Given) -> tuple[ScheduleConfig, tuple[str, ...]]:
    """The schedule, and a warning where a run that the command line shortened loses a part of its own.

    An entry of `lr_custom_step` beyond the epochs is a mistake (`utils.schedule.check`) unless a later
    `--epochs` has replaced those that it was written for.
    """
    epochs, before = given["epochs"], given.replaced.get("epochs", [])
    steps, beyond, warnings = given["lr_custom_step"], (), ()
    if before and "lr_custom_step" not in given.replaced:
        beyond = tuple(step for step in steps if step > epochs)
    if beyond:
        written = ",".join(map(str, beyond))
        warnings = (f"--lr_custom_step: {written} falls away, since --epochs {epochs} replaces {before[-1]}",)
    config = ScheduleConfig(
        policy=given["lr_policy"],
        epochs=given["epochs"],
        extra_epoch=given["extra_epoch"],
        decay=given["lr_decay"],
        eta_min=given["eta_min"],
        fix_step=given["lr_fix_step"],
        custom_step=tuple(step for step in steps if step not in beyond),
        wakeup=given["wakeup"],
        wakeup_epoch=given["wakeup_epoch"],
        warmup=given["warmup"],
        warmup_epoch=given["warmup_epoch"],
    )
    return config, warnings


def _precision_config(given: Given) -> PrecisionConfig:
    for name in ("opt_level", "amp_dtype", "amp_backend"):
        if given[name] is not None and not given["fp16"]:
            raise UserError(f"--{name} {given[name]} needs --fp16: without it everything is float32")
    level = given["opt_level"] or ("O1" if given["fp16"] else "O0")
    return PrecisionConfig(
        level=level,
        dtype=given["amp_dtype"] or "bfloat16",
        backend=given["amp_backend"] or "torch",
        tf32=bool(given["tf32"]),
        channels_last=given["memory_format"] == "channels_last",
    )


def _device_config(given: Given) -> DeviceConfig:
    ids = tuple(index for part in given["device_ids"] or () for index in part)
    written = " ".join(map(str, ids))
    if any(index < 0 for index in ids):
        raise UserError(f"--device_ids {written}: GPUs are counted from 0")
    if len(set(ids)) < len(ids):
        raise UserError(f"--device_ids {written}: each GPU takes one process, name it once")
    for name in ("world_size", "rank"):
        if given[name] is not None and not given["distributed"]:
            raise UserError(f"--{name} {given[name]} belongs to --distributed: add it or leave --{name} out")
    world, rank = given["world_size"], given["rank"]
    if world is not None and world < 1:
        raise UserError(f"--world_size {world}: must be at least 1")
    if rank is not None and not 0 <= rank < (world or rank + 1):
        raise UserError(f"--rank {rank}: processes are counted from 0 to world_size - 1")
    return DeviceConfig(
        ids=ids,
        distributed=bool(given["distributed"]),
        world_size=world,
        rank=rank,
        sync_bn=bool(given["sync_bn"]),
    )


def _run_config(given: Given, fields: Mapping[str, Any]) -> RunConfig:
    return RunConfig(
        case=given["case"],
        seed=given["seed"],
        evaluate=bool(given["evaluate"]),
        audit=bool(given["audit"]),
        dry_run=bool(given["dry_run"]),
        lr_test=bool(fields.get("run.lr_test", False)),
        resume=bool(given["resume"]),
        resume_file=None if given["resume_file"] is None else Path(given["resume_file"]),
        pretrained=given["pretrained"],
        ema_weights=bool(given["ema_weights"]),
        unresume_scope=given["unresume_scope"],
        weights_dir=Path(given["weights_dir"]),
        log_dir=Path(given["log_dir"]),
        save_freq=given["save_freq"],
        save_every=given["save_every"],
        keep=given["keep"],
        report_freq=given["report_freq"],
        tensorboard=bool(given["tensorboard"]),
        verbose=bool(given["verbose"]) or bool(fields.get("run.verbose", False)),
        shortened=bool(given.replaced.keys() & {"epochs", "dataset", "fake_size"}),
        bn_batches=given["bn_batches"],
        delay=given["delay"],
    )


def _probe_config(given: Given, fields: Mapping[str, Any]) -> ProbeConfig:
    for name in ("probe_index", "probe_iteration"):
        if any(number < 0 for number in given[name]):
            raise UserError(f"--{name}: {min(given[name])} is not a number from 0")
    if not given["probe_index"]:
        raise UserError("--probe_index: name at least one image of the batch, like 0")
    chosen = {"probe_list", "probe_index", "probe_iteration"} & given.explicit
    return ProbeConfig(
        enable=bool(fields.get("probe.enable", False)) or bool(chosen),
        layers=given["probe_list"],
        images=given["probe_index"],
        iterations=given["probe_iteration"],
    )


def to_dict(config: Any) -> Any:
    """A configuration as plain dictionaries, lists and strings, for YAML and for checkpoints."""
    if dataclasses.is_dataclass(config):
        return {item.name: to_dict(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(name): to_dict(value) for name, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config
