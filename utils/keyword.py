"""The keywords of `--keyword`, declared once each, and their resolution into typed fields.

A keyword is a frozen record: it sets fields of the configuration by their dotted names. No other
module mentions a keyword. `resolve` reports every mistake of a list at once.
"""

from __future__ import annotations

import difflib
import os
import runpy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.errors import UserError
from utils.options import OPTIONS, TAGS


@dataclass(frozen=True, kw_only=True)
class Keyword:
    """One word of `--keyword`.

    Attributes:
        name: as it is written, case matters.
        group: the heading it is listed under.
        help: one line.
        sets: dotted field -> value. Two words of equal rank that set a field to different values
            contradict each other.
        rank: 0 sets defaults, 1 refines them (`lsq` over `dorefa`), 2 refines one tag (`wt_lsq`).
        requires: groups of words; of each group at least one must be given too.
        excludes: words that cannot be given with this one.
        families: networks it has an effect on, of `utils.resolve.network.FAMILIES`; empty: all.
        idle_with: a word beside which this one has no effect -> groups of words, each of which gives it one
            all the same.
    """

    name: str
    group: str
    help: str
    sets: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    requires: tuple[tuple[str, ...], ...] = ()
    excludes: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    idle_with: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)


_REGISTRY: dict[str, Keyword] = {}


def register(keyword: Keyword) -> None:
    """Declare a keyword; user files call this too.

    Raises:
        UserError: when the name is taken or is not one word.
    """
    if keyword.name in _REGISTRY:
        raise UserError(f"the keyword {keyword.name!r} is declared already; choose another name")
    if not keyword.name or any(c in keyword.name for c in ", \t\n"):
        raise UserError(f"{keyword.name!r} cannot be a keyword: no commas and no spaces")
    _REGISTRY[keyword.name] = keyword


def registry() -> dict[str, Keyword]:
    """Every keyword by name, in the order of declaration."""
    return dict(_REGISTRY)


def load_file(path: str) -> None:
    """Run a user's Python file that registers more keywords.

    Its keywords may set `extra.NAME`, which networks and quantizers find in their `extra`, and every
    field that the keywords declared before it set.

    Raises:
        UserError: when the file is missing or fails, or a keyword of it sets a field that nothing reads.
    """
    if not os.path.isfile(path):
        raise UserError(f"--keyword_file {path}: no such file; give the path of a Python file")
    before = registry()
    fields = {name for keyword in before.values() for name in keyword.sets}
    try:
        runpy.run_path(path)
    except UserError as error:
        raise UserError(f"--keyword_file {path}: {error}") from error
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(f"--keyword_file {path}: {type(error).__name__}: {error}") from error
    for keyword in _REGISTRY.keys() - before.keys():
        for name, value in _REGISTRY[keyword].sets.items():
            if name not in fields and not name.startswith("extra."):
                close = " or ".join(difflib.get_close_matches(name, fields, n=2)) or f"extra.{name}"
                raise UserError(
                    f"--keyword_file {path}: {keyword} sets {name}, which nothing reads; write {close}"
                )
            if not _is_plain(value):
                raise UserError(
                    f"--keyword_file {path}: {keyword} sets {name} to {value!r}, which cannot be saved with "
                    "a run; use numbers, texts, lists and dictionaries"
                )


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# Declarations ------------------------------------------------------------------------------------


def _declare(group: str, *keywords: tuple[str, str, dict[str, Any]], **common: Any) -> None:
    for name, help, rest in keywords:
        register(Keyword(name=name, group=group, help=help, **{**common, **rest}))


def _sets(**fields: Any) -> dict[str, Any]:
    return {"sets": {name.replace("__", "."): value for name, value in fields.items()}}


def _method(method: str, *tags: str) -> dict[str, Any]:
    return {"sets": {f"quant.{tag}.method": method for tag in tags or ("fm", "wt", "ot")}}


def _dataset(name: str, stem: str, classes: int, size: int) -> dict[str, Any]:
    return _sets(data__dataset=name, stem__kind=stem, model__num_classes=classes, model__input_size=size)


_declare(
    "data set",
    (
        "imagenet",
        "7x7 stem with stride 2 and pooling, 1000 classes, 224 px",
        _dataset("imagenet", "imagenet", 1000, 224),
    ),
    ("cifar10", "3x3 stem, 10 classes, 32 px", _dataset("cifar10", "cifar", 10, 32)),
    ("cifar100", "3x3 stem, 100 classes, 32 px", _dataset("cifar100", "cifar", 100, 32)),
    ("digits", "3x3 stem, 10 classes, 32 px", _dataset("digits", "cifar", 10, 32)),
    ("glyphs", "3x3 stem, 62 classes, 32 px", _dataset("glyphs", "cifar", 62, 32)),
)
_declare(
    "order of a unit",
    ("cbas", "convolution, norm, activation, skip", _sets(block__order="cbas")),
    ("cbsa", "convolution, norm, skip, activation (the original ResNet)", _sets(block__order="cbsa")),
    ("cabs", "convolution, activation, norm, skip (Group-Net)", _sets(block__order="cabs")),
    ("bacs", "norm, activation, convolution, skip (pre-activation)", _sets(block__order="bacs")),
    ("bcas", "norm, convolution, activation, skip", _sets(block__order="bcas")),
    families=("resnet",),
)
_declare(
    "skip connection",
    ("origin", "one skip around the whole block, not around every convolution", _sets(block__skip="block")),
    ("fix", "the sum of a block is activated (c-first orders) or its output normalised (b-first)",
     _sets(block__fix=True)),
    ("singleconv", "shortcuts stride in their convolution instead of pooling",
     {**_sets(block__shortcut_pool=False), "idle_with": {"DCHR": (), "ReShapeResolution": ()}}),
    ("real_skip", "convolutions of shortcuts and of ReShapeResolution stay in full precision",
     {**_sets(block__shortcut_full_precision=True), "idle_with": {"DCHR": (("ReShapeResolution",),)}}),
    ("identify_norm", "a norm on identity shortcuts too", _sets(block__identity_norm=True)),
    ("DCHR", "shortcuts double channels by concatenating pooled copies",
     {**_sets(block__shortcut_repeat=True), "idle_with": {"ReShapeResolution": ()}}),
    families=("resnet",),
)  # fmt: skip
_declare(
    "stem and head",
    (
        "fix_pooling",
        "norm and activation before the stem's pooling",
        {**_sets(stem__norm_before_pool=True), "idle_with": {"preBN": (("patch_preBN_stem",),)}},
    ),
    (
        "preBN",
        "no norm in the stem, one before the final pooling (for b-first orders)",
        _sets(stem__pre_norm=True),
    ),
    (
        "patch_preBN_stem",
        "an activation after preBN's norm; with fix_pooling the stem's norm and activation again",
        {**_sets(stem__pre_norm_activation=True), "requires": (("preBN",),)},
    ),
    (
        "group-net",
        "no activation in the stem",
        {**_sets(stem__activation=False), "idle_with": {"preBN": (("patch_preBN_stem", "fix_pooling"),)}},
    ),
    ("TResNetStem", "space-to-depth by 4, then a convolution", _sets(stem__space_to_depth=4)),
    (
        "TResNetStemMaxPool",
        "space-to-depth by 2, a convolution, then max pooling",
        _sets(stem__space_to_depth=2),
    ),
    (
        "small_stem",
        "the stem for small images, whatever the data set's own: 3x3, no stride, no pooling",
        {
            **_sets(stem__kind="cifar"),
            "rank": 1,
            "excludes": ("TResNetStem", "TResNetStemMaxPool"),
            "families": ("resnet", "mobilenet", "classic"),
        },
    ),
    families=("resnet",),
)
_declare(
    "activation",
    ("ReLU", "the default of every network but mobilenetv2", _sets(model__activation="relu")),
    ("NReLU", "no activation", _sets(model__activation="none")),
    ("PReLU", "learned slope below zero", _sets(model__activation="prelu")),
    ("ReLU6", "clipped at 6", _sets(model__activation="relu6")),
    ("LReLU", "leaky, slope 0.01 below zero", _sets(model__activation="leaky")),
    families=("resnet", "mobilenet", "classic"),
)
_declare(
    "norm",
    ("group-norm", "group normalisation, --fm_quant_group groups", _sets(model__norm="group")),
    ("static-bn", "fixed statistics, learned affine part", _sets(model__norm="static")),
    ("freeze-bn", "fixed statistics and affine part", _sets(model__norm="frozen")),
    ("reverse-bn", "the affine part before normalising", _sets(model__norm="reverse")),
    ("instance-norm", "instance normalisation", _sets(model__norm="instance")),
    families=("resnet", "pytorch", "mobilenet", "classic"),
    idle_with={"fixup": (("ReShapeResolution",),)},
)
_declare(
    "network variant",
    ("zir", "the last norm of each block starts at zero",
     {**_sets(block__zero_init=True), "excludes": ("freeze-bn",), "idle_with": {"instance-norm": ()}}),
    ("fixup", "Fixup: no norms, scaled initialisation",
     {**_sets(block__fixup=True), "excludes": ("preBN", "zir", "identify_norm", "bn_before_restore")}),
    ("bias", "Fixup's scalar biases", {**_sets(block__fixup_bias=True), "requires": (("fixup",),)}),
    ("prone", "3x3 convolutions become 1x1 ones through space-to-depth",
     {**_sets(block__prone=True), "excludes": ("preBN",)}),
    ("no_prone_downsample", "prone: strided convolutions stay as they are",
     {**_sets(block__prone_strided=False), "requires": (("prone",),)}),
    ("bn_before_restore", "prone: the norm before depth-to-space",
     {**_sets(block__prone_norm_inside=True), "requires": (("prone",),)}),
    ("ReShapeResolution", "lossless downsampling before strided blocks, its layers by --order",
     _sets(block__downsample_order="cba")),
    families=("resnet",),
)  # fmt: skip
_declare(
    "quantized layers",
    ("first-last", "the first and the last layer are quantized too", _sets(quant__first_last=True)),
    ("real_depthwise", "depth-wise convolutions stay in full precision",
     {**_sets(quant__depthwise=False), "families": ("torchvision", "timm", "mobilenet")}),
)  # fmt: skip

_BASES = ("dorefa", "pact", "lq", "xnor")
_declare(
    "quantizer",
    ("dorefa", "DoReFa-Net", _method("dorefa")),
    ("pact", "PACT: a learned clip value for activations, DoReFa-Net's weights", _method("pact")),
    ("lq", "LQ-Nets: levels are the sums of a learned basis", _method("lq")),
    ("xnor", "XNOR-Net: signs, scaled", _method("xnor")),
    ("lsq", "LSQ: a learned clip value for activations and weights",
     {**_method("lsq"), "rank": 1, "excludes": ("pact", "lq", "xnor")}),
    ("non-uniform", "FATNN: learned thresholds, up to 4 levels; weights ternary",
     {**_method("fatnn"), "rank": 1, "excludes": ("pact", "lq", "xnor")}),
    *((f"{tag}_{word}", f"{name} for {what}s alone",
       {**_method(method, tag), "rank": 2, "requires": (_BASES,)})
      for word, method, name in (("lsq", "lsq", "LSQ"), ("non-uniform", "fatnn", "FATNN"))
      for tag, what in TAGS.items()),
    ("gamma", "a learned scale per group on quantized weights (XNOR-Net++)",
     {**_sets(quant__wt__gamma=True), "excludes": ("dorefa",)}),
    ("wt_gamma", "a learned scale per group on quantized weights, for any method",
     _sets(quant__wt__gamma=True)),
    ("ot_gamma", "a learned scale per group on quantized outputs", _sets(quant__ot__gamma=True)),
    ("wt_bin", "one-bit weights sign(w) * mean|w|",
     {**_sets(quant__wt__binary_scale=True), "requires": (("dorefa", "pact"),)}),
    ("custom-update", "LQ-Nets: the basis as a running mean over iterations",
     _sets(quant__custom_update=True)),
    ("closed_form", "FATNN: multiply the result by a running least-squares scale",
     {**_sets(quant__closed_form=True),
      "requires": (("non-uniform", *(f"{tag}_non-uniform" for tag in TAGS)),)}),
    ("proxquant", "blend quantized values in over --proxquant_step iterations",
     {**_sets(quant__proxquant=True), "requires": (_BASES,)}),
    ("progressive", "keep the step when a policy lowers the levels", _sets(quant__progressive=True)),
)  # fmt: skip
_declare(
    "training",
    (
        "label-smooth",
        "smooth the labels by --label_smooth, 0.1 when it is not given",
        _sets(loss__label_smooth=0.1),
    ),
    (
        "lr-test",
        "print and draw the learning rates of the whole schedule and train nothing",
        _sets(run__lr_test=True),
    ),
    (
        "debug",
        "log every quantizer's settings, and its state after each epoch, as --verbose does",
        _sets(run__verbose=True),
    ),
    (
        "probe",
        "write tensors of quantized layers at some iterations, see --probe_list",
        _sets(probe__enable=True),
    ),
)


_declare(
    "older configs",
    ("save", "a word of tools.py: nothing here", {}),
    ("raw", "a word of tools.py: nothing here", {}),
    ("mean", "nothing here", {}),
    ("pretrain", "nothing here", {}),
)


# Resolution --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolution:
    """What a list of keywords says.

    Attributes:
        fields: dotted field -> value.
        origins: dotted field -> the keyword that set it.
        warnings: keywords that have no effect on the chosen network.
    """

    fields: dict[str, Any]
    origins: dict[str, str]
    warnings: tuple[str, ...]


def resolve(words: Iterable[str], family: str) -> Resolution:
    """The fields that `words` set, for a network of `family`.

    Raises:
        UserError: naming every unknown word (with close names), contradiction and missing requirement.
    """
    words = tuple(dict.fromkeys(words))
    known = [_REGISTRY[word] for word in words if word in _REGISTRY]
    problems = [_unknown(word) for word in words if word not in _REGISTRY]
    problems += _contradictions(known)
    for keyword in known:
        for group in keyword.requires:
            if not set(group) & set(words):
                problems.append(f"{keyword.name} needs {' or '.join(group)}")
    if problems:
        raise UserError("--keyword: " + "; ".join(problems))

    fields: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for keyword in sorted(known, key=lambda k: k.rank):
        fields.update(keyword.sets)
        origins.update(dict.fromkeys(keyword.sets, keyword.name))
    warnings = tuple(
        f"the keyword {k.name} has no effect on this network" for k in known if not _acts(k, family)
    )
    warnings += tuple(f"the keyword {k.name} has no effect: it sets nothing" for k in known if not k.sets)
    warnings += tuple(
        f"the keyword {k.name} has no effect beside {other}"
        for k in known
        for other, rescues in k.idle_with.items()
        if other in words and not any(set(group) <= set(words) for group in rescues) and _acts(k, family)
    )
    return Resolution(fields, origins, warnings)


def _acts(keyword: Keyword, family: str) -> bool:
    """Whether networks of `family` know the keyword; nobody knows whether a user's own do."""
    return not keyword.families or family in (*keyword.families, "own")


def _unknown(word: str) -> str:
    if word.replace("-", "_") in OPTIONS:
        return f"unknown keyword {word!r}, which is an option: write --{word}"
    folded = {name.lower(): name for name in _REGISTRY}
    close = [folded[name] for name in difflib.get_close_matches(word.lower(), folded, n=3)]
    return f"unknown keyword {word!r}" + (f", did you mean {' or '.join(close)}?" if close else
                                          ", see --list_keywords")  # fmt: skip


def _contradictions(keywords: list[Keyword]) -> list[str]:
    found = []
    for i, first in enumerate(keywords):
        for second in keywords[i + 1 :]:
            excluded = second.name in first.excludes or first.name in second.excludes
            clash = first.rank == second.rank and any(
                name in second.sets and second.sets[name] != value for name, value in first.sets.items()
            )
            if excluded or clash:
                found.append(f"{first.name} contradicts {second.name}, keep one of them")
    return found


def table() -> str:
    """The registry as plain text, a group at a time."""
    width = max(len(name) for name in _REGISTRY)
    lines: list[str] = []
    for group in dict.fromkeys(k.group for k in _REGISTRY.values()):
        lines.append(f"{group}:")
        for k in (k for k in _REGISTRY.values() if k.group == group):
            lines.append(f"  {k.name:<{width}}  {k.help}{_relations(k)}")
    return "\n".join(lines)


def _relations(keyword: Keyword) -> str:
    notes = [f"needs {' or '.join(group)}" for group in keyword.requires]
    notes += [f"not with {', '.join(keyword.excludes)}"] if keyword.excludes else []
    idle: dict[str, list[str]] = {}
    for other, rescues in keyword.idle_with.items():
        unless = " or ".join(" and ".join(word for word in group if word != other) for group in rescues)
        idle.setdefault(f" without {unless}" if unless else "", []).append(other)
    notes += [f"no effect beside {' or '.join(others)}{unless}" for unless, others in idle.items()]
    return f" ({'; '.join(notes)})" if notes else ""


def markdown() -> str:
    """The registry as the text of docs/keywords.md."""
    lines = [
        "# Keywords", "",
        "Words of the comma-separated list `--keyword`; `python main.py --list_keywords` prints them too. This page is",
        "made from the registry by `python -m utils.keyword > docs/keywords.md`.", "",
    ]  # fmt: skip
    for group in dict.fromkeys(k.group for k in _REGISTRY.values()):
        lines += [f"## {group.capitalize()}", "", "| keyword | meaning | sets |", "| --- | --- | --- |"]
        for k in (k for k in _REGISTRY.values() if k.group == group):
            sets = ", ".join(f"`{name} = {value}`" for name, value in k.sets.items())
            lines.append(f"| `{k.name}` | {k.help}{_relations(k)} | {sets} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
