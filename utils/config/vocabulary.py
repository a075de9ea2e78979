"""The keywords of `--keyword`, declared once each."""

from __future__ import annotations

from typing import Any

from utils.config.keyword import Keyword, register, registry, relations
from utils.config.methods import PROJECT
from utils.config.schema import TAGS


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
    ("cbas", "convolution, norm, activation, skip; MobileNets have no other",
     {**_sets(block__order="cbas"), "families": ("resnet", "mobilenet")}),
    ("cbsa", "convolution, norm, skip, activation (the original ResNet)", _sets(block__order="cbsa")),
    ("cabs", "convolution, activation, norm, skip (Group-Net)", _sets(block__order="cabs")),
    ("bacs", "norm, activation, convolution, skip (pre-activation)", _sets(block__order="bacs")),
    ("bcas", "norm, convolution, activation, skip", _sets(block__order="bcas")),
    ("cba", "convolution, norm, activation: vgg_small and nin have no other", {"families": ("classic",)}),
    families=("resnet",),
)  # fmt: skip
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
    (
        "RPReLU",
        "ReActNet: a learned slope below a learned point, for each channel",
        _sets(model__activation="rprelu"),
    ),
    families=("resnet", "mobilenet", "classic"),
)
_declare(
    "norm",
    ("group-norm", "group normalisation, --fm_quant_group groups", _sets(model__norm="group")),
    ("static-bn", "fixed statistics, learned affine part", _sets(model__norm="static")),
    ("freeze-bn", "fixed statistics and affine part", _sets(model__norm="frozen")),
    ("reverse-bn", "the affine part before and after normalising", _sets(model__norm="reverse")),
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
    ("attention-matmul", "both factors of attention's two matrix products are quantized, as --fm_* says, but for "
     "their signs: the softmax's output has levels from zero, the others are signed",
     _sets(quant__attention_matmul=True)),
)  # fmt: skip

# Words of methods that also choose them for one tag alone.
_BY_TAG = (
    ("lsq", "lsq", "LSQ"),
    ("lsqplus", "lsqplus", "LSQ+"),
    ("ewgs", "ewgs", "EWGS"),
    ("stableqat", "stableqat", "StableQAT"),
    ("apot", "apot", "APoT"),
    ("n2uq", "n2uq", "N2UQ"),
    ("non-uniform", "fatnn", "FATNN"),
)
_ALONE = ("pact", "lq", "xnor", "reactnet")  # beside which `lsq` and its like may not stand
_declare(
    "quantizer",
    ("dorefa", "DoReFa-Net", _method("dorefa")),
    ("pact", "PACT: a learned clip value for activations, DoReFa-Net's weights", _method("pact")),
    ("lq", "LQ-Nets: levels are the sums of a learned basis", _method("lq")),
    ("xnor", "XNOR-Net: signs, scaled", _method("xnor")),
    ("reactnet", "ReActNet: signs around a learned threshold per channel, XNOR-Net's weights",
     _method("reactnet")),
    ("lsq", "LSQ: a learned clip value for activations and weights",
     {**_method("lsq"), "rank": 1, "excludes": _ALONE}),
    ("lsqplus", "LSQ+: a learned clip value and offset for activations, LSQ's weights",
     {**_method("lsqplus"), "rank": 1, "excludes": _ALONE}),
    ("ewgs", "EWGS: a learned clip value, and gradients that grow with the distance to the level",
     {**_method("ewgs"), "rank": 1, "excludes": _ALONE}),
    ("stableqat", "StableQAT: a learned clip value, and gradients that are small at a level and whole at a threshold",
     {**_method("stableqat"), "rank": 1, "excludes": _ALONE}),
    ("apot", "APoT: levels are sums of powers of two, up to a learned clip value",
     {**_method("apot"), "rank": 1, "excludes": _ALONE}),
    ("n2uq", "N2UQ: learned thresholds for activations of even levels, weights of high entropy",
     {**_method("n2uq"), "rank": 1, "excludes": _ALONE}),
    ("non-uniform", "FATNN: learned thresholds, up to 4 levels; weights ternary",
     {**_method("fatnn"), "rank": 1, "excludes": _ALONE}),
    *((f"{tag}_{word}", f"{name} for {what}s alone",
       {**_method(method, tag), "rank": 2, "requires_method": True})
      for word, method, name in _BY_TAG
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
     {**_sets(quant__proxquant=True), "requires_method": True}),
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


# The words that choose a method, as messages propose them.
METHOD_WORDS = (
    "lsq",
    "pact",
    "lsqplus",
    "ewgs",
    "stableqat",
    "apot",
    "n2uq",
    "dorefa",
    "lq",
    "non-uniform",
    "xnor",
    "reactnet",
)


def own_method_words(tag: str) -> tuple[str, ...]:
    """The keywords of users that choose a method of their own for a tag."""
    methods = (
        (word, keyword.sets.get(f"quant.{tag}.method", "none")) for word, keyword in registry().items()
    )
    return tuple(word for word, method in methods if method not in (*PROJECT, "none"))


def markdown() -> str:
    """The registry as the text of docs/keywords.md."""
    lines = [
        "# Keywords", "",
        "Words of the comma-separated list `--keyword`; `python main.py --list_keywords` prints them too. This page is",
        "made from the registry by `python -m utils.config.vocabulary > docs/keywords.md`.", "",
    ]  # fmt: skip
    for group in dict.fromkeys(k.group for k in registry().values()):
        lines += [f"## {group.capitalize()}", "", "| keyword | meaning | sets |", "| --- | --- | --- |"]
        for k in (k for k in registry().values() if k.group == group):
            sets = ", ".join(f"`{name} = {value}`" for name, value in k.sets.items())
            lines.append(f"| `{k.name}` | {k.help}{relations(k)} | {sets} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
