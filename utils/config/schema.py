"""The typed, frozen configuration of a run.

The command line (`utils.config.command_line`) and the keywords (`utils.config.keyword`) become these dataclasses, and
no other code looks at a keyword again. Fields are checked when the configuration is resolved (`utils.config.resolve`),
before anything is loaded; those of quantizers, which other programs write in Python, in their constructors too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.config.blocks import BlockConfig, StemConfig
from utils.config.checks import Checks, unlike
from utils.config.image_size import InputSize
from utils.config.layer_bits import WIDTHS, LayerBits, is_width
from utils.errors import UserError

TAGS = {"fm": "activation", "wt": "weight", "ot": "output"}
# Limits of boundary and scale; no clip value is below, and their quotients stay finite.
LEAST, MOST = 1e-6, 1e6
MAX_LEVELS = 2**16
COMPILES = ("none", "default", "reduce-overhead", "max-autotune")  # modes of torch.compile
GRIDS = ("midrise", "midtread")
ADAPTIVE = ("none", "mean", "var", "mean-var", "var-mean")
GRAD_TYPES = ("none", "STE", "Triangle", "STE-scale")
GRAD_SCALES = ("none", "fan-scale", "scale-fan", "element-scale", "scale-element", "paper")
CUSTOM_SCALES = ("none", "channel", "resolution")
KERNELS = ("eager", "compiled")
LAYOUTS = ("channels_last", "contiguous")
TRACKERS = ("mlflow", "wandb", "none")
RANGE_SEARCHES = ("paper", "mse", "percentile")
READ_ETA_MIN = {"poly", "sgdr", "sgdr_step", "cos"}  # learning-rate policies that read `eta_min`
# Training options that policies may set.
TRAINING = ("lr", "weight_decay", "custom_lr", "custom_decay", "momentum", "grad_clip")
RECORDED = -1  # number of a policy's entry that restores a checkpoint's state


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of a policy file.

    Attributes:
        section: "init", "epoch" or "iteration".
        number: of the entry in its section, from 1; 0: from `--full_precision`; RECORDED: a checkpoint's state.
        at: epochs done, or iterations (steps of the optimizer) done, when it is applied; empty in `init`.
        index: the layers it selects, numbered from 0 in the order of the network; empty: all.
        name: the layers it selects, as a shell pattern of their whole name.
        tag: fm, wt or ot; empty: all.
        values: the attributes of quantizers, or the training options, that it sets.
    """

    section: str
    number: int
    at: tuple[int, ...] = ()
    index: tuple[int, ...] = ()
    name: str = "*"
    tag: str = ""
    values: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def trains(self) -> bool:
        """Whether it sets training options."""
        return next(iter(self.values)) in TRAINING

    def __str__(self) -> str:
        """Its name in messages."""
        entry = f"policy: entry {self.number} of {self.section}"
        return f"--{entry if self.number else f'full_precision {self.name}'}"


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The quantizers of one tag: "fm" activations, "wt" weights, "ot" outputs; see docs/quantizers.md.

    Which methods there are, and which fields they read, is not checked here but where quantizers are built, since
    programs register methods of their own. NumPy's scalars become Python's.

    Raises:
        UserError: a field does not take its value, for any field; the message names the nearest value that it takes.

    Example:
        >>> from utils.config.schema import QuantizerConfig
        >>> QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4).levels
        4
        >>> QuantizerConfig(tag="wt", grad_scale="papr")
        Traceback (most recent call last):
        utils.errors.UserError: QuantizerConfig: grad_scale 'papr' is not known: did you mean 'paper'?
    """

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
    grad_delta: float = 1e-3  # EWGS: growth of a gradient by the distance to the level
    grad_window: float = 1.0  # signs: where the gradient of "STE" and "Triangle" ends
    gamma: bool = False  # a learned scale per output group
    binary_scale: bool = False  # DoReFa's one-bit weight: sign(w) * mean|w|
    custom: str = "none"  # XNOR-Net's activation scale: mean |x| over "channel" or "resolution"
    custom_update: bool = False  # LQ-Nets: the basis as a running mean
    closed_form: bool = False  # FATNN: a running least-squares scale on the result
    proxquant_step: int = 0  # training forwards over which the quantized value is blended in; 0: at once
    progressive: bool = False  # a policy that changes the levels keeps the step, not the clip value
    stable: int = 0  # training iterations that pass through unquantized while ranges are collected
    stable_epoch: int = 0  # the same in epochs; the longer of the two counts
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # fields of the user's own keywords

    def __post_init__(self) -> None:
        """Refuse values that no quantizer takes."""
        check = Checks(self)
        check.choice("tag", tuple(TAGS))
        check.choice("grid", GRIDS)
        check.choice("adaptive", ADAPTIVE)
        check.choice("grad_type", GRAD_TYPES)
        check.choice("grad_scale", GRAD_SCALES)
        check.choice("custom", CUSTOM_SCALES)
        check.integer("levels", 2, MAX_LEVELS if self.enable else 2**32)
        for name in ("boundary", "scale", "grad_window"):
            check.number(name, LEAST, MOST)
        check.number("grad_delta", 0, MOST)
        for name in ("ratio", "correlate"):
            check.number(name, -math.inf, math.inf)
        for name in ("proxquant_step", "stable", "stable_epoch"):
            check.integer(name, 0)
        if self.quant_group is not None:
            check.integer("quant_group", -MAX_LEVELS)
            if self.quant_group == 0:
                raise check.error(
                    "quant_group", "makes no groups: give their number, -k for groups of k, or None"
                )
        check.flags()
        check.names("extra")
        if not isinstance(self.method, str) or not self.method:
            raise check.error("method", "must be the name of a method, such as 'lsq'")
        if self.enable and self.method == "none":
            raise check.error("method", "quantizes nothing: name one, such as 'lsq', or leave enable out")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """The quantizers of every convolution (and, on request, linear layer) of a network.

    Raises:
        UserError: a part has another tag than its name says, or a field does not take its value.

    Example:
        >>> from utils.config.schema import QuantConfig, QuantizerConfig
        >>> config = QuantConfig(
        ...     fm=QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True),
        ...     wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4),
        ... )
        >>> config.enabled
        True
    """

    fm: QuantizerConfig = QuantizerConfig(tag="fm", half_range=True)
    wt: QuantizerConfig = QuantizerConfig(tag="wt")
    ot: QuantizerConfig = QuantizerConfig(tag="ot")
    padding_after_quant: bool = False
    re_init: bool = False
    re_init_missing: bool = False  # leave quantizers that the loaded weights hold
    re_init_range: str = "paper"  # how clip values are found: "paper", "mse" or "percentile"
    re_init_percentile: float = 99.9  # percent
    first_last: bool = False  # quantize the first and the last layer too
    first_signed: bool = False  # then the first layer, which reads the images, has signed levels
    first_bit: int | str | None = None  # bits of the first layer, signed for its input; 32: full precision
    last_bit: int | str | None = None  # the same of the last layer
    layer_bits: tuple[LayerBits, ...] = ()  # bits of single layers; later ones win
    depthwise: bool = True  # quantize depth-wise convolutions too
    attention_matmul: bool = False  # quantize both factors of attention's two products, by `fm`

    def __post_init__(self) -> None:
        """Refuse parts that are of another tag, and values that the fields do not take."""
        for tag in TAGS:
            part = getattr(self, tag)
            if not isinstance(part, QuantizerConfig):
                found = unlike(part, QuantizerConfig)
                raise UserError(
                    f"QuantConfig: {tag} must be a QuantizerConfig(tag={tag!r}, ...), not {found}"
                )
            if part.tag != tag:
                raise UserError(
                    f"QuantConfig: {tag} has a QuantizerConfig of {part.tag!r}: build it with tag={tag!r}"
                )
        check = Checks(self)
        check.choice("re_init_range", RANGE_SEARCHES)
        check.number("re_init_percentile", 0, 100)
        if self.re_init_percentile == 0:
            raise check.error("re_init_percentile", "must be above 0 and at most 100")
        for name in ("first_bit", "last_bit"):
            if getattr(self, name) is not None and not is_width(getattr(self, name)):
                raise check.error(name, f"must be {WIDTHS}")
        rules = self.layer_bits
        if not isinstance(rules, tuple) or not all(isinstance(rule, LayerBits) for rule in rules):
            raise check.error("layer_bits", "must be a tuple of LayerBits: give quantize a list of entries")
        check.flags()

    @property
    def enabled(self) -> bool:
        """True when at least one tag quantizes."""
        return self.fm.enable or self.wt.enable or self.ot.enable

    @property
    def quantizes_matmuls(self) -> bool:
        """Whether attention's products are quantized: that is asked for, and `fm` quantizes."""
        return self.attention_matmul and self.fm.enable


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network: which one, its width and the parts above. The builder refuses unknown norms and activations."""

    name: str = "resnet20"
    num_classes: int = 10
    input_size: InputSize = 32  # pixels
    channels: int = 3  # of the images; 1: grey
    width_alpha: float = 1.0
    base: int = 1  # parallel branches of a block (Group-Net)
    norm: str = "batch"  # batch, static, frozen, reverse, instance or group
    activation: str = "relu"  # relu, none, prelu, relu6, leaky or rprelu
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # fields of the user's own keywords
    block: BlockConfig = field(default_factory=BlockConfig)
    stem: StemConfig = field(default_factory=StemConfig)
    quant: QuantConfig = QuantConfig()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are batched."""

    dataset: str = "digits"
    root: Path | None = None
    batch_size: int = 128  # images per iteration
    val_batch_size: int = 128  # 0: no validation
    train: bool = True  # False: an evaluation, which needs no training images
    workers: int = 2
    num_classes: int = 10
    count_classes: bool = False  # num_classes is not given and becomes the number of class folders
    val_split: float = 0.0  # of each class, for validation where the folder has no val/; 0: it has
    val_files: str = ""  # digest of the names of the validation images that are so split off
    classes: tuple[str, ...] = ()  # of an evaluated checkpoint, whose classes the data may be a part of
    input_size: InputSize = 32
    channels: int = 3  # 1: colours become grey
    mean: tuple[float, ...] | None = None  # per channel, of images in [0, 1]; None: the data set's own
    std: tuple[float, ...] | None = None
    balanced: bool = False  # draw training images so that all classes are equally frequent
    class_weights: str | None = None  # in the training loss: "balanced", or a file
    class_weight_values: tuple[float, ...] = ()  # of that file, in the order of the classes
    fonts: Path | None = None  # folder of fonts for `glyphs`; None: matplotlib's
    fake_size: int = 256  # images of the `fake` training set; the validation set has a quarter
    seed: int = 0
    rank: int = 0  # number of this process of a distributed run, from 0
    world_size: int = 1  # its processes; `batch_size` is that of each
    colour: bool = False  # change the colours of training images
    rand_augment: int | None = None  # magnitude of RandAugment, 0 to 30; None: none
    mixup_alpha: float = 0.0  # parameter of Mixup's beta distribution; 0: no Mixup
    cutmix_alpha: float = 0.0  # the same of CutMix
    skip_corrupt: int = 0  # unreadable images that may be left out
    max_value: int | None = (
        None  # of 16-bit images, becomes white; None: the largest one of the training images
    )
    ignore_orientation: bool = False  # JPEG, PNG and WebP as they are stored, not turned as EXIF says


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

    def __post_init__(self) -> None:
        """Refuse values that nothing knows."""
        Checks(self).choice("kind", ("kl", "mse"))


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss that training minimises."""

    label_smooth: float = 0.0
    focal_gamma: float = 0.0  # 0: cross-entropy
    focal_alpha: float = 1.0
    distill: DistillConfig | None = None
    quant_loss: float = 0.0  # factor on the relative quantization error of the weights
    dampen: float = 0.0  # factor on the dampening of oscillations, at the end of training


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Averaging and freezing of weights, after each step of the optimizer."""

    ema_decay: float = 0.0  # of averaged weights; 0: none
    freeze_threshold: tuple[float, ...] = ()  # oscillations per step that freeze a weight: from, to
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

    @property
    def all_epochs(self) -> int:
        """The epochs of the run, `extra_epoch` included."""
        return self.epochs + self.extra_epoch


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """The floating-point types of a run; see `utils.step.precision`."""

    level: str = "O0"  # O0 float32, O1 autocast, O2 half weights with float32 masters, O3 all half
    dtype: str = "bfloat16"  # or float16
    tf32: bool = False
    channels_last: bool = True
    compile: str = "none"  # or a mode of torch.compile
    kernels: str = "eager"  # of quantizers; compiled: see `model.quantizers.kernels`
    recompute: bool = False  # see `model.layers.quantized.QuantLayer`

    def __post_init__(self) -> None:
        """Refuse values that nothing knows."""
        Checks(self).choice("level", ("O0", "O1", "O2", "O3"))
        Checks(self).choice("compile", COMPILES)
        Checks(self).choice("kernels", KERNELS)
        Checks(self).choice("dtype", ("bfloat16", "float16"))


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """The devices and processes of a run; None: as the environment says."""

    ids: tuple[int, ...] = ()
    distributed: bool = False
    world_size: int | None = None
    rank: int | None = None
    sync_bn: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The job of a run, and where its results go."""

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
    reference: str | None = (
        None  # of an evaluation: as `pretrained`, the network beside which classes are compared
    )
    keyword_file: str | None = None  # the user's file that registered more keywords
    unresume_scope: tuple[str, ...] = ()
    weights_dir: Path = Path("weights")
    log_dir: Path = Path("exp")
    save_freq: int = 0  # epochs between checkpoints that are kept; 0: only the latest and the best
    save_every: int = 0  # iterations between saves of the latest checkpoint; 0: after epochs only
    keep: int = 2  # how many of the latest checkpoints stay
    report_freq: int = 50  # iterations between two lines of the log
    tensorboard: bool = False
    track: str | None = None  # "mlflow" or "wandb"
    verbose: bool = False
    shortened: bool = False  # epochs or data were replaced on the command line: warm-ups shrink to fit
    bn_batches: int = 0  # training batches for batch norms' statistics before each validation; 0: as trained
    delay: float = 0.0  # seconds per iteration


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Tensors that are written while a run trains; see `model.watch.probe`."""

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
    origins: dict[str, str] = field(
        default_factory=dict, hash=False
    )  # field -> the keyword or option that set it
    warnings: tuple[str, ...] = ()
