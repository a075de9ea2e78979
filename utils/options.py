"""Every command-line option, declared once as a frozen record, and the parser built from them.

Nothing heavy is imported here: `python main.py --help` answers at once, and a mistake is found before
torch is loaded. Options with several words may be written with `_` or `-`.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError

T = TypeVar("T")


def words(text: str) -> tuple[str, ...]:
    """Comma-separated words; spaces around them and empty ones are dropped."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def integer(text: str) -> int:
    """An integer, which may be written as 2.0."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def integers(text: str) -> tuple[int, ...]:
    """Comma-separated integers."""
    return _all(int, text, "whole numbers with commas between, like 2,4")


def floats(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    return _all(float, text, "numbers with commas between, like 0.5,0.25")


def _all(kind: Callable[[str], T], text: str, what: str) -> tuple[T, ...]:
    try:
        return tuple(kind(word) for word in words(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from error


def loss_type(text: str) -> str:
    """A distillation loss; soft is an older name of kl."""
    return "kl" if text == "soft" else text


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option.

    Attributes:
        name: with underscores; `--name` on the command line.
        kind: converts the text; `bool` is a flag that takes no value.
        default: the value when it is not given; `None`: derived, as the help says.
        help: one line, with the unit.
        aliases: other spellings, with their dashes.
        choices: the only values.
        many: takes several values.
        undoes: a flag that this one takes back when it comes later.
        unset: values that mean that it is not given: defaults that configs of an earlier implementation write out.
    """

    name: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    many: bool = False
    undoes: str = ""
    unset: tuple[Any, ...] = ()


def _option(name: str, kind: Callable[[str], Any], default: Any, help: str, **rest: Any) -> Option:
    return Option(name=name, kind=kind, default=default, help=help, **rest)


COMMON: dict[str, tuple[Option, ...]] = {
    "data": (
        _option(
            "dataset",
            str,
            None,
            "data set; default: the keyword's, else digits",
            choices=("digits", "glyphs", "cifar10", "cifar100", "imagenet", "dali", "fake"),
        ),
        _option("root", str, None, "folder of the data set (imagenet: holds train/ and val/)"),
        _option("batch_size", int, 128, "images per iteration", aliases=("-b",)),
        _option(
            "val_batch_size",
            int,
            None,
            "images per validation step; 0: no validation; default: batch_size",
            aliases=("-v",),
        ),
        _option("workers", int, 2, "processes that decode images", aliases=("-j",)),
        _option(
            "addition_augment",
            bool,
            False,
            "colour jitter and PCA lighting",
            aliases=("--aa",),
        ),
        _option("rand_augment", int, None, "RandAugment's magnitude, 0 to 30; default: none"),
        _option("skip_corrupt", int, 0, "image files that may be left out because they cannot be read"),
        _option("mean", floats, None, "mean per channel, of images in [0, 1]; default: the data set's"),
        _option("std", floats, None, "standard deviation per channel; default: the data set's"),
        _option("fake_size", int, 256, "training images of the data set fake"),
    ),
    "optimizer": (
        _option("optimizer", str, "SGD", "SGD or ADAM"),
        _option("lr", float, 0.1, "base learning rate", aliases=("--learning_rate",)),
        _option("momentum", float, 0.9, "SGD's momentum"),
        _option("nesterov", bool, False, "Nesterov's momentum"),
        _option("weight_decay", float, 1e-4, "weight decay", aliases=("--wd",)),
        _option("decay_small", bool, False, "weight decay for one-dimensional and depth-wise weights too"),
        _option("no_decay_small", bool, False, "takes a --decay_small before it back", undoes="decay_small"),
        _option("custom_decay_list", words, (), "parameters whose name contains one of these words ..."),
        _option("custom_decay", float, 0.02, "... have this weight decay"),
        _option("custom_lr_list", words, (), "parameters whose name contains one of these words ..."),
        _option("custom_lr", float, 1e-5, "... have this base learning rate"),
        _option("grad_clip", float, None, "largest norm of the gradient; default: no clipping"),
        _option("iter_size", int, 1, "forward and backward passes per optimizer step"),
    ),
    "schedule": (
        _option("epochs", int, 10, "epochs of the schedule"),
        _option("extra_epoch", int, 0, "epochs after the schedule, at its last rate"),
        _option(
            "lr_policy", str, "custom_step", "custom_step, fix_step, decay, fix, poly, sgdr, sgdr_step or cos"
        ),
        _option("lr_decay", float, 0.1, "factor of the step policies and of decay; the power of poly"),
        _option("eta_min", float, 0.0, "lowest learning rate of poly, sgdr and cos"),
        _option("lr_fix_step", int, 30, "fix_step: epochs between two decays"),
        _option("lr_custom_step", integers, (), "epochs of custom_step's decays and of sgdr's restarts"),
        _option("wakeup", int, 0, "iterations of linear warm-up from zero"),
        _option("wakeup_epoch", int, 0, "the same in epochs; the longer of the two counts"),
        _option("warmup", int, 0, "first iterations without an optimizer step"),
        _option("warmup_epoch", int, 0, "the same in epochs; the longer of the two counts"),
    ),
    "precision": (
        _option("fp16", bool, False, "train in half precision, as opt_level says"),
        _option(
            "opt_level",
            str,
            None,
            "O0: float32; O1: autocast; O2: half weights, float32 norms and master weights; O3: all half [O1]",
            choices=("O0", "O1", "O2", "O3"),
        ),
        _option(
            "amp_dtype",
            str,
            None,
            "the half precision; gradients of float16 are scaled [bfloat16]",
            choices=("bfloat16", "float16"),
        ),
        _option(
            "amp_backend",
            str,
            None,
            "torch, or an installed apex that still has amp [torch]",
            choices=("torch", "apex"),
        ),
        _option("tf32", bool, False, "let NVIDIA GPUs multiply float32 in TF32, faster and less exact"),
        _option(
            "memory_format",
            str,
            "channels_last",
            "order of an image's numbers in memory",
            choices=("channels_last", "contiguous"),
        ),
    ),
    "devices": (
        _option(
            "device_ids",
            integers,
            None,
            "GPUs, a process each; default: the first one, the CPU where there is none",
            aliases=("-g",),
            many=True,
        ),
        _option(
            "distributed", bool, False, "join the processes of world_size and rank; torchrun needs no option"
        ),
        _option("world_size", int, None, "number of processes; default: the variable WORLD_SIZE"),
        _option("rank", int, None, "number of this process, from 0; default: the variable RANK"),
        _option("sync_bn", bool, False, "batch statistics over the images of all processes"),
    ),
    "run": (
        _option("case", str, "default", "name of the run: of its checkpoints and its folder in log_dir"),
        _option("seed", int, 0, "seed of everything random"),
        _option("evaluate", bool, False, "validate only; nothing is written but the log", aliases=("-e",)),
        _option(
            "audit", bool, False, "check on real data that every quantizer quantizes (always after training)"
        ),
        _option(
            "dry_run", bool, False, "print configuration, network, groups, schedule and totals; train nothing"
        ),
        _option(
            "bn_batches",
            int,
            0,
            "training batches that batch norms' statistics are computed from anew before validation; 0: none",
        ),
        _option("delay", float, 0.0, "seconds to wait in each iteration"),
    ),
    "checkpoints and logs": (
        _option(
            "pretrained", str, None, "checkpoint to start from: a path, a name in weights_dir/MODEL, or none"
        ),
        _option("resume", bool, False, "continue the case from its newest whole checkpoint", aliases=("-r",)),
        _option("resume_file", str, None, "continue from this checkpoint"),
        _option("unresume_scope", words, (), "parts of parameter names that --pretrained leaves alone"),
        _option("weights_dir", str, "weights", "folder of the checkpoints"),
        _option("log_dir", str, "exp", "folder of logs, metrics and TensorBoard files"),
        _option(
            "save_freq",
            int,
            0,
            "epochs between checkpoints that are kept; 0: the latest and the best only",
            aliases=("-s",),
            unset=(-1,),
        ),
        _option(
            "save_every", int, 0, "iterations between saves of the latest checkpoint; 0: after epochs only"
        ),
        _option("keep", int, 2, "how many of the latest checkpoints stay: the latest and those before it"),
        _option("report_freq", integer, 50, "iterations between two lines of the log"),
        _option("tensorboard", bool, False, "write TensorBoard files"),
        _option("verbose", bool, False, "log parameter groups and the details of loading"),
    ),
    "loss": (
        _option(
            "label_smooth", float, None, "label smoothing; default: 0, with the keyword label-smooth 0.1"
        ),
        _option("focal_gamma", float, 0.0, "focal loss: exponent of 1 - p of the class; 0: cross-entropy"),
        _option("focal_alpha", float, 1.0, "focal loss: factor on all of it", unset=(-1.0,)),
        _option("distill_teacher", str, None, "distillation: the teacher, as --model, or none", unset=("",)),
        _option(
            "distill_keyword",
            words,
            None,
            "the teacher's keywords; default: the network's without quantizers",
        ),
        _option(
            "distill_width_alpha", float, None, "the teacher's width; default: the network's width_alpha"
        ),
        _option(
            "distill_pretrained",
            str,
            None,
            "the teacher's checkpoint: a path, or a name in weights_dir/TEACHER",
        ),
        _option("distill_loss_alpha", float, 0.5, "share of the distillation loss, the labels' is the rest"),
        _option("distill_loss_temperature", float, 4.0, "temperature of the soft labels"),
        _option(
            "distill_loss_type",
            loss_type,
            "kl",
            "kl: divergence of soft labels; mse: squared error of logits",
            choices=("kl", "mse"),
        ),
        _option("quant_loss", float, 0.0, "factor on the relative quantization error of the weights"),
        _option(
            "dampen", float, 0.0, "factor on the dampening of oscillating weights at the end of training"
        ),
    ),
    "weights": (
        _option("ema_decay", float, 0.0, "decay of averaged weights, evaluated beside the network; 0: none"),
        _option("ema_weights", bool, False, "take the averaged weights of the --pretrained checkpoint"),
        _option(
            "freeze_threshold",
            floats,
            (),
            "freeze weights that oscillate more often in a step; two: from, to, along a cosine",
        ),
        _option("freeze_momentum", float, 0.01, "momentum of the frequencies of oscillation"),
    ),
}

TAGS = {"fm": "activation", "wt": "weight", "ot": "output"}
LEAST, MOST = 1e-6, 1e6  # of boundary and scale: a clip value is never less, and their quotients are floats


def _quantizer_options(tag: str, what: str) -> tuple[Option, ...]:
    half = (
        "levels symmetric in [-c, c] instead of [0, c]"
        if tag == "fm"
        else "levels in [0, c] instead of [-c, c]"
    )
    group = "1" if tag != "wt" else "one per output channel"
    options = [
        _option(f"{tag}_enable", bool, False, f"quantize every {what}"),
        _option(f"{tag}_bit", integer, 8, f"bits of the {what} quantizer, 2^bit levels"),
        _option(
            f"{tag}_level", int, None, "number of levels instead, 3 is ternary; default: 2^bit", unset=(-1, 0)
        ),
        _option(f"{tag}_half_range", bool, False, half),
        _option(
            f"{tag}_quant_group",
            int,
            None,
            f"groups that share parameters, -k: groups of k; default: {group}",
            unset=(0,),
        ),
        _option(f"{tag}_boundary", float, 1.0, "initial clipping value"),
        _option(
            f"{tag}_scale", float, 0.5, "factor of the gradient scales; FATNN's slopes, LQ-Nets' thresholds"
        ),
        _option(f"{tag}_ratio", float, 1.0, "share that a method of your own may read; no other does"),
        _option(f"{tag}_correlate", float, -1.0, "factor on the calibrated clip value; not used when <= 0"),
        _option(
            f"{tag}_adaptive",
            str,
            "none",
            "normalise before quantizing",
            choices=("none", "mean", "var", "mean-var", "var-mean"),
        ),
        _option(f"{tag}_adaptive_restore", bool, False, "undo the normalisation after quantizing"),
        _option(
            f"{tag}_grad_type",
            str,
            "none",
            "gradient through the rounding",
            choices=("none", "STE", "Triangle", "STE-scale"),
        ),
        _option(
            f"{tag}_grad_scale",
            str,
            "none",
            "factor on the clip value's gradient",
            choices=("none", "fan-scale", "scale-fan", "element-scale", "scale-element", "paper"),
        ),
        _option(
            f"{tag}_grid",
            str,
            "midrise",
            "levels of a full range: midtread has one at zero (lsq)",
            choices=("midrise", "midtread"),
        ),
    ]
    if tag == "fm":
        options.append(
            _option(
                "fm_custom",
                str,
                "none",
                "XNOR-Net's activation scale: mean |x| over ...",
                choices=("none", "channel", "resolution"),
            )
        )
    return tuple(options)


MODEL: dict[str, tuple[Option, ...]] = {
    "model": (
        _option("model", str, "resnet20", "network", aliases=("-m", "--arch")),
        _option("keyword", words, (), "comma-separated keywords, see --list_keywords"),
        _option("keyword_file", str, None, "Python file that registers more keywords"),
        _option("list_keywords", bool, False, "print every keyword and exit"),
        _option("num_classes", int, None, "classes; default: the data set keyword's"),
        _option("input_size", int, None, "height and width of the images, pixels; default: the keyword's"),
        _option("width_alpha", float, 1.0, "factor on the network's width (64 channels in the first stage)"),
        _option("base", int, 1, "parallel branches of a block (Group-Net)"),
        _option("stem_kernel", int, None, "kernel of the TResNet stems, 1 or 3; default: 1"),
        _option(
            "order",
            str,
            None,
            "keyword ReShapeResolution: its layers, of c, b and a; default: cba",
            unset=("none",),
        ),
        _option("padding_after_quant", bool, False, "quantize first and pad with exact zeros"),
        _option(
            "re_init",
            bool,
            False,
            "initialise the quantizers from the loaded weights and one batch, before training",
        ),
        _option(
            "re_init_range",
            str,
            "paper",
            "how re_init finds clip values: LSQ's formula, least squared error, or a percentile of |x|",
            choices=("paper", "mse", "percentile"),
        ),
        _option("re_init_percentile", float, 99.9, "the percentile, percent"),
        _option(
            "stable", int, 0, "first training iterations in full precision, which calibrate the clip values"
        ),
        _option("stable_epoch", int, 0, "the same in epochs; the longer of the two counts"),
    ),
    **{f"{what} quantizer": _quantizer_options(tag, what) for tag, what in TAGS.items()},
    "steering": (
        _option(
            "policy",
            str,
            None,
            "YAML file that changes quantizers and training options as the run goes; see docs/policies.md",
        ),
        _option(
            "proxquant_step",
            int,
            1000,
            "keyword proxquant: training iterations until all is quantized",
            aliases=("--ps",),
        ),
        _option("mixup_enable", bool, False, "Mixup: train on mixtures of two images"),
        _option("mixup_alpha", float, 0.2, "parameter of Mixup's beta distribution"),
        _option("cutmix_enable", bool, False, "CutMix: paste a part of another image"),
        _option("cutmix_alpha", float, 1.0, "parameter of CutMix's beta distribution"),
        _option(
            "probe_list",
            words,
            (),
            "layers whose tensors are written to log_dir/CASE/probe, by name or pattern [every quantized layer]",
            unset=((),),
        ),
        _option("probe_index", integers, (0,), "images of the batch that are kept of them", many=True),
        _option(
            "probe_iteration", integers, (), "iterations of the run, from 0, at which [first, middle, last]"
        ),
    ),
}

OLDER: dict[str, tuple[Option, ...]] = {
    "older configs (taken, with a warning, and without effect)": (
        *(
            _option(f"{tag}_separator", float, None, f"of {what} quantizers that are not here")
            for tag, what in TAGS.items()
        ),
        _option("ot_independent_parameter", bool, False, "of output quantizers that are not here"),
        _option("block_alpha", float, None, "of networks that are not here"),
        _option("se_reduction", int, None, "of networks that are not here"),
        _option("repvgg_block", str, None, "of networks that are not here", unset=("",)),
        _option("wakeup_lr", float, None, "of a warm-up that does not begin at zero, which is not here"),
    ),
}

GROUPS = {**MODEL, **COMMON, **OLDER}
OPTIONS: dict[str, Option] = {option.name: option for group in GROUPS.values() for option in group}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py", usage="python main.py [options]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train image classifiers with low-bit weights and activations.",
        epilog="Usually: bash train.sh config/config.NAME [options]. Guide: docs/classification.md",
    )  # fmt: skip
    for title, group in GROUPS.items():
        section = parser.add_argument_group(title)
        for option in group:
            spellings = [*option.aliases, f"--{option.name}"]
            if option.undoes:
                section.add_argument(
                    *spellings, dest=option.name, action=_Undo, const=option.undoes, nargs=0, help=option.help
                )
                continue
            if option.kind is bool:
                section.add_argument(
                    *spellings, dest=option.name, action="store_true", default=None, help=option.help
                )
                continue
            default = "" if option.default in (None, ()) else f" [{option.default}]"
            section.add_argument(
                *spellings, dest=option.name, action=_Last, const=option, type=option.kind, default=None,
                metavar=_metavar(option),
                choices=option.choices or None, nargs="+" if option.many else None,
                help=(option.help + default).replace("%", "%%"),
            )  # fmt: skip
    return parser


def _metavar(option: Option) -> str:
    if option.choices:
        return "{" + ",".join(option.choices) + "}"
    names = {int: "N", integer: "N", float: "X", words: "WORDS", integers: "N,N", floats: "X,X"}
    return names.get(option.kind, option.name.upper())


_BARE = re.compile(r"--\w+")
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def _canonical(argument: str) -> str:
    """`--iter-size=2` as `--iter_size=2`; other arguments unchanged."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _joined(arguments: Iterable[str]) -> list[str]:
    """With `--name -1.` as `--name=-1.`: argparse takes not every negative number for a value."""
    joined: list[str] = []
    for argument in arguments:
        if joined and _NEGATIVE.fullmatch(argument) and _BARE.fullmatch(joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


class _Last(argparse.Action):
    """Stores the last of several values and keeps the earlier ones: what a config had said.

    `const` is the `Option`. Several words of one become one tuple.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        option: Any = self.const
        if option.many:
            values = tuple(value for word in values for value in word)
        if values in option.unset:
            values = None
        before = getattr(namespace, self.dest)
        if before is not None:
            namespace.replaced.setdefault(self.dest, []).append(before)
        setattr(namespace, self.dest, values)


class _Undo(argparse.Action):
    """A flag that takes back the one named `const`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, True)
        setattr(namespace, str(self.const), None)


class Given(dict[str, Any]):
    """The values of all options by name.

    Attributes:
        explicit: the names that were written.
        replaced: name -> the values that a later one on the same command line has replaced, in order; a
            config's, mostly, that the options behind it override.
    """

    def __init__(self, written: dict[str, Any], replaced: Mapping[str, Sequence[Any]] | None = None) -> None:
        super().__init__({name: option.default for name, option in OPTIONS.items()} | written)
        self.explicit = frozenset(written)
        self.replaced = dict(replaced or {})


def parse(argv: Sequence[str]) -> Given:
    """The options of a command line.

    Raises:
        UserError: for an unknown option (with close names) or a value that does not fit.
        SystemExit: for `--help`.
    """
    start = argparse.Namespace(replaced={})
    known, unknown = _parser().parse_known_args(_joined(map(_canonical, argv)), start)
    if unknown:
        spellings = [f"--{name}" for name in OPTIONS] + [a for o in OPTIONS.values() for a in o.aliases]
        first = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(first, spellings, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "python main.py --help lists the options"
        raise UserError(f"unknown option {unknown[0]}: {hint}")
    written = {name: value for name, value in vars(known).items() if name in OPTIONS and value is not None}
    return Given(written, known.replaced)
