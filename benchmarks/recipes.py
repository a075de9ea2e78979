"""The rows of the tables that `digits.py` trains: methods, their options, the recipes and where each starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

BLOCK = "origin,cbsa,fix_pooling,singleconv,fix"  # the original ResNet
# Signs of activations behind a ReLU would all be +1; Bi-Real Net's block has no ReLU, a skip around every
# convolution and shortcuts in full precision. Without quantizers it is a linear network, a start for the binary
# ones but no yardstick.
BINARY_BLOCK = "NReLU,cbsa,fix_pooling,singleconv,real_skip"
# The same with ReActNet's activation, not linear.
REACT_BLOCK = "RPReLU,cbsa,fix_pooling,singleconv,real_skip"
PRELU_BLOCK = f"{BLOCK},PReLU"  # the original one, with activations below zero

FULL = "-b 64 --epochs 30 --lr 0.1 --weight_decay 5e-4 --label_smooth 0.1 --wakeup_epoch 1"
# With norms the loss does not depend on the size of a weight, and its gradient is large where the weight is small:
# without warm-up and clipping the first steps move binary weights so far from zero that their signs never change again.
# Weights that oscillate up to the last step spoil the norms' running statistics, which are therefore re-estimated.
TUNE = (
    "-b 32 --epochs 10 --lr 0.05 --weight_decay 1e-4 --label_smooth 0.1 --wakeup_epoch 1 --grad_clip 1 "
    "--bn_batches 20 --re_init"
)
BOTH = "--fm_enable --wt_enable"
NO_START = "random weights"  # of a row that starts from no other network


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: for the table.
        bits: weights/activations, for the table.
        keywords: of the method.
        options: of the command line.
        block: the keywords of the network's blocks.
        most: the largest gap to full precision, in points, that counts as reached; a target, not a claim. None: a row
            for comparison.
        recipe: of the training, to which `options` are added; {teacher} is the full-precision checkpoint of the seed.
        start: the row, of this set, whose networks it starts from; empty: the full-precision ones of its block;
            `NO_START`: none.
    """

    name: str
    bits: str
    keywords: str
    options: str
    most: float | None
    block: str = BLOCK
    recipe: str = TUNE
    start: str = ""


def bits(count: int) -> str:
    """The options for weights and activations of `count` bits."""
    return f"{BOTH} --fm_bit {count} --wt_bit {count}"


FULL_PRECISION = Method("full precision", "32/32", "", "", None)
WHOLE = {  # the full-precision network of each block
    BLOCK: FULL_PRECISION,
    BINARY_BLOCK: replace(FULL_PRECISION, name="full precision, block without ReLU", block=BINARY_BLOCK),
    REACT_BLOCK: replace(FULL_PRECISION, name="full precision, block with RPReLU", block=REACT_BLOCK),
    PRELU_BLOCK: replace(FULL_PRECISION, name="full precision, PReLU", block=PRELU_BLOCK),
}
CASES = {
    BLOCK: "fp",
    BINARY_BLOCK: "fp-binary-block",
    REACT_BLOCK: "fp-react-block",
    PRELU_BLOCK: "fp-prelu-block",
}
TERNARY = f"{BOTH} --fm_bit 2 --fm_level 3 --wt_bit 2 --wt_level 3"
LIMIT = {1: 3.0, 2: 0.6, 3: 0.3, 4: 0.3}
CENTRED = "--wt_adaptive var-mean"  # DoReFa-Net's weights per channel: one range for all is too coarse for three levels
QUICK = (Method("LSQ", "2/2", "dorefa,lsq", bits(2), LIMIT[2]),)
ALL = (
    *(Method("LSQ", f"{b}/{b}", "dorefa,lsq", bits(b), LIMIT[b]) for b in (4, 3, 2)),
    Method("LSQ", "ternary", "dorefa,lsq", TERNARY, 1.0),
    Method("LSQ", "1/1", "dorefa,lsq", f"{bits(1)} --wt_grad_scale paper", LIMIT[1]),
    *(Method("LSQ, mid-tread weights", f"{b}/{b}", "dorefa,lsq", f"{bits(b)} --wt_grid midtread", LIMIT[b])
      for b in (4, 3, 2)),
    *(Method("PACT", f"{b}/{b}", "pact", bits(b), LIMIT[b]) for b in (4, 3, 2)),
    Method("PACT, centred weights", "ternary", "pact", f"{TERNARY} {CENTRED}", 1.0),
    Method("PACT", "ternary", "pact", TERNARY, None),
    Method("PACT, binary weights", "1/1", "pact,wt_bin", bits(1), LIMIT[1]),
    *(Method("DoReFa-Net, clip 1", f"{b}/{b}", "dorefa", bits(b), None) for b in (4, 3, 2)),
    *(Method("DoReFa-Net, clip 3", f"{b}/{b}", "dorefa", f"{bits(b)} --fm_boundary 3", LIMIT[b])
      for b in (4, 3, 2)),
    Method("DoReFa-Net, clip 3, centred weights", "ternary", "dorefa", f"{TERNARY} --fm_boundary 3 {CENTRED}", 1.0),
    Method("DoReFa-Net, clip 3", "ternary", "dorefa", f"{TERNARY} --fm_boundary 3", None),
    Method("DoReFa-Net, clip 3", "1/1", "dorefa,wt_bin", f"{bits(1)} --fm_boundary 3", LIMIT[1]),
    *(Method("LQ-Nets", f"{b}/{b}", "lq", bits(b), LIMIT[b]) for b in (4, 3, 2, 1)),
    Method("FATNN, LSQ weights", "2/2", "dorefa,fm_non-uniform,wt_lsq", bits(2), LIMIT[2]),
    Method("FATNN", "ternary", "dorefa,non-uniform", TERNARY, 1.0),
    Method("XNOR-Net", "1/1", "xnor", f"{bits(1)} --fm_grad_type STE", LIMIT[1], BINARY_BLOCK),
    Method("XNOR-Net++", "1/1", "xnor,gamma", f"{bits(1)} --fm_grad_type STE", LIMIT[1], BINARY_BLOCK),
    Method("Bi-Real gradient", "1/1", "xnor", f"{bits(1)} --fm_grad_type Triangle", LIMIT[1], BINARY_BLOCK),
)  # fmt: skip

# Initial clip values: by the paper's formula and, in the second row of each pair, at the least squared error.
STARTS = tuple(
    replace(m, name=f"{m.name}{where}", options=f"{m.options}{option}")
    for m in ALL
    if m.name == "LSQ" or (m.name, m.bits) == ("PACT, binary weights", "1/1")
    for where, option in (("", ""), (", least squared error", " --re_init_range mse"))
)

# Quantizers of other libraries, see peer_methods.py: all with the same recipe, and ranges that start alike.
PEERS = tuple(
    Method(name, f"{b}/{b}", words, f"{bits(b)} --keyword_file benchmarks/peer_methods.py", None)
    for b in (2, 3, 4)
    for name, words in (
        ("LSQ", "dorefa,lsq"),  # of this project
        ("LSQ as lsq-net computes it", "lsq-net"),
        ("Brevitas, learned scales", "brevitas"),
        ("torchao, range learning", "torchao"),
    )
)

# Levels from zero, levels around zero and levels from a learned offset, for activations of which a part is below zero.
BELOW_ZERO = tuple(
    Method(name, "2/2", words, f"{bits(2)}{option}", None, PRELU_BLOCK)
    for name, words, option in (
        ("LSQ, levels from zero", "dorefa,lsq", ""),
        ("LSQ, levels around zero", "dorefa,lsq", " --fm_half_range"),
        ("LSQ+", "lsqplus", ""),
    )
)

# A teacher's outputs in place of smoothed labels, no clipping of gradients, and statistics of norms from a whole epoch.
TAUGHT = "--distill_teacher resnet20 --distill_pretrained {teacher}"
TAUGHT_BINARY = f"{TAUGHT} --distill_keyword glyphs,{BLOCK}"
STEPS = "-b 32 --epochs 10 --wakeup_epoch 1 --bn_batches 96 --re_init"
SGD = "--lr 0.05 --weight_decay 1e-4"
ADAM = "--optimizer ADAM --lr 0.005 --weight_decay 0"
ONE = f"{bits(1)} --fm_grad_type Triangle"
WINDOW = "--fm_grad_type STE --fm_grad_window 2"
ALL_OF_THE_TEACHER = "--distill_loss_alpha 1 --distill_loss_temperature 1"
REACTNET = Method("ReActNet", "1/1", "reactnet", ONE, None, REACT_BLOCK, f"{STEPS} {ADAM} {TAUGHT_BINARY}")
# The gradient of a sign passes up to a distance of 2 from its threshold, not of 1, and does not fall on the way.
WIDE = replace(REACTNET, name="ReActNet, wide window", options=f"{bits(1)} {WINDOW}")
WIDE_FIRST_STEP = replace(
    WIDE,
    name="ReActNet, wide window, its first step",
    bits="32/1",
    options=f"--fm_enable --fm_bit 1 {WINDOW}",
)
TWO = Method("LSQ, taught", "2/2", "dorefa,lsq", bits(2), None, recipe=f"{STEPS} {SGD} {TAUGHT}")
TWO_FIRST_STEP = replace(
    TWO, name="LSQ, taught, its first step", bits="32/2", options="--fm_enable --fm_bit 2"
)


def longer(row: Method) -> Method:
    """The row in one step of as many epochs as two steps have together."""
    return replace(row, name=f"{row.name}, 20 epochs", options=f"{row.options} --epochs 20")


def second_step(name: str, keywords: str, first: Method = TWO_FIRST_STEP) -> Method:
    """The row of 2-bit weights and activations that starts from a first step."""
    return replace(TWO, name=f"{name}, two steps", keywords=keywords, start=first.name)


def kept(row: Method) -> Method:
    """The second step's row, whose activations keep what the first step has learned; --re_init alone finds it anew."""
    return replace(row, name=f"{row.name}, kept", options=f"{row.options} --re_init_missing")


LSQ = Method("LSQ", "2/2", "dorefa,lsq", bits(2), None)
LSQ_TWO_STEPS = second_step("LSQ, taught", "dorefa,lsq")
RECIPES = (WIDE, longer(WIDE), LSQ, TWO, longer(TWO))
WIDE_TWO_STEPS = replace(WIDE, name="ReActNet, wide window, two steps", start=WIDE_FIRST_STEP.name)
N2UQ_FIRST_STEP = replace(TWO_FIRST_STEP, name="N2UQ, taught, its first step", keywords="n2uq")


TWO_STEPS = (  # beside one step of as many epochs, and the recipes for 2 bits with other methods
    WIDE_FIRST_STEP,
    WIDE_TWO_STEPS,
    kept(WIDE_TWO_STEPS),
    longer(WIDE),
    longer(LSQ),
    longer(TWO),
    longer(replace(TWO, name="LSQ+, taught", keywords="lsqplus")),
    longer(replace(TWO, name="APoT, taught", keywords="apot")),
    TWO_FIRST_STEP,
    LSQ_TWO_STEPS,
    kept(LSQ_TWO_STEPS),
    N2UQ_FIRST_STEP,
    second_step("LSQ, EWGS weights", "dorefa,lsq,wt_ewgs"),
    second_step("LSQ, StableQAT weights", "dorefa,lsq,wt_stableqat"),
    second_step("N2UQ, LSQ weights", "dorefa,fm_n2uq,wt_lsq", N2UQ_FIRST_STEP),
    second_step("N2UQ, StableQAT weights", "dorefa,fm_n2uq,wt_stableqat", N2UQ_FIRST_STEP),
)
# Of the binary recipe, one at a time; smoothed labels take the teacher's place, and SGD has its own rate and decay.
FACTORS = (
    Method("XNOR-Net", "1/1", "xnor", f"{bits(1)} --fm_grad_type STE", None, BINARY_BLOCK),
    REACTNET,
    replace(REACTNET, name="ReActNet, STE", options=f"{bits(1)} --fm_grad_type STE"),
    WIDE,
    replace(REACTNET, name="ReActNet, untaught", recipe=f"{STEPS} {ADAM} --label_smooth 0.1"),
    replace(REACTNET, name="ReActNet, the paper's loss", options=f"{ONE} {ALL_OF_THE_TEACHER}"),
    replace(REACTNET, name="ReActNet, SGD", recipe=f"{STEPS} {SGD} {TAUGHT_BINARY}"),
    replace(REACTNET, name="ReActNet, constant rate", options=f"{ONE} --lr_policy fix"),
    replace(
        REACTNET, name="ReActNet, thresholds learned from 0", recipe=REACTNET.recipe.replace(" --re_init", "")
    ),
    replace(REACTNET, name="ReActNet, thresholds of 0", keywords="xnor"),
    replace(REACTNET, name="ReActNet, no activation", block=BINARY_BLOCK),
    replace(REACTNET, name="ReActNet, weight decay 1e-4", options=f"{ONE} --weight_decay 1e-4"),
    replace(REACTNET, name="ReActNet, random weights at the start", start=NO_START),
    longer(REACTNET),
)
