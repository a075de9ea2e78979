"""The keyword-configured ResNet: its structure, the order of its layers, and its gradients."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers.quantized import QuantLayer, quantizers
from model.networks.build import build_network
from utils.config.resolve import read
from utils.errors import UserError

BASIC = ("resnet18", "resnet20", "resnet32", "resnet34", "resnet44", "resnet56")
BOTTLENECK = ("resnet50", "resnet101", "resnet152")
BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet20": (3, 3, 3),
    "resnet32": (5, 5, 5),
    "resnet34": (3, 4, 6, 3),
    "resnet44": (7, 7, 7),
    "resnet50": (3, 4, 6, 3),
    "resnet56": (9, 9, 9),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
ORDERS = ("cbas", "cbsa", "cabs", "bacs", "bcas")
QUANTIZED = ("--fm_enable", "--wt_enable", "--fm_bit", "2", "--wt_bit", "2")
WIDTH = 4  # channels of the first stage at the width_alpha used here

Op = Callable[[Tensor], Tensor]


def network(model: str, keywords: str, *options: str) -> nn.Module:
    """The network of a command line, always the same initial weights."""
    torch.manual_seed(0)
    argv = ["--model", model, "--keyword", keywords, "--width_alpha", "0.0625", *options]
    return build_network(read(argv).model)


def images(size: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def variants(models: tuple[str, ...], full: bool) -> list[tuple[str, str]]:
    """(model, keywords) over orders and, when `full`, skips, fix and pooling of the shortcut."""
    found = []
    for model, order in itertools.product(models, ORDERS):
        skips = ("origin",) if model in BOTTLENECK else ("origin", "")
        extras = (
            itertools.product(skips, ("", "fix"), ("", "singleconv")) if full else [("origin", "fix", "")]
        )
        for words in extras:
            pre = "preBN" if order.startswith("b") else ""
            found.append((model, ",".join(filter(None, (order, *words, pre)))))
    return found


GRID = variants(("resnet18", "resnet20", "resnet50"), full=True) + variants(
    ("resnet32", "resnet34", "resnet44", "resnet56", "resnet101", "resnet152"), full=False
)


@pytest.mark.parametrize(("model", "keywords"), GRID)
def test_every_parameter_learns(model: str, keywords: str) -> None:
    net = network(model, f"digits,dorefa,lsq,{keywords}", *QUANTIZED).train()
    logits = net(images(16, count=8))
    assert logits.shape == (8, 10)
    loss = functional.cross_entropy(logits, torch.arange(8))
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} gets a gradient of zeros"
    assert len(list(quantizers(net))) > 2 * sum(BLOCKS[model])


@pytest.mark.parametrize("model", BASIC + BOTTLENECK)
def test_depth(model: str) -> None:
    """A ResNet is called by its layers: the first convolution, those of the blocks, and `fc`."""
    net = network(model, "digits,cbsa,origin")
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and ".skip." not in n]
    assert len(names) + 1 == int(model.removeprefix("resnet"))
    for stage, blocks in enumerate(BLOCKS[model], start=1):
        units = 3 if model in BOTTLENECK else 2
        wanted = [f"layer{stage}.{b}.conv{k}.0" for b in range(blocks) for k in range(1, units + 1)]
        assert [name for name in names if name.startswith(f"layer{stage}.")] == wanted


@pytest.mark.parametrize("model", BOTTLENECK)
@pytest.mark.parametrize("order", ORDERS)
def test_bottlenecks_need_a_skip_around_the_block(model: str, order: str) -> None:
    with pytest.raises(UserError, match=f"{model}.*origin"):
        network(model, f"digits,{order}")


def test_unknown_model_names_close_ones() -> None:
    with pytest.raises(UserError, match="resnet18"):
        network("resnet19", "digits,cbsa")


# Shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "keywords", "size", "expected"),
    [
        ("resnet20", "cifar10,cbsa,origin", 32, [(4, 32), (8, 16), (16, 8)]),
        ("resnet18", "digits,bacs,preBN", 16, [(4, 16), (8, 8), (16, 4), (32, 2)]),
        ("resnet18", "imagenet,cabs", 64, [(4, 16), (8, 8), (16, 4), (32, 2)]),
        ("resnet50", "imagenet,cbsa,origin,singleconv", 64, [(16, 16), (32, 8), (64, 4), (128, 2)]),
        ("resnet18", "imagenet,cbsa,origin,singleconv", 56, [(4, 14), (8, 7), (16, 4), (32, 2)]),
    ],
)
def test_stage_shapes(model: str, keywords: str, size: int, expected: list[tuple[int, int]]) -> None:
    """(channels, height) after each stage."""
    net = network(model, keywords).eval()
    shapes: list[tuple[int, ...]] = []
    for name, module in net.named_children():
        if name.startswith("layer"):
            module.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape)))
    with torch.no_grad():
        net(images(size, count=2))
    assert shapes == [(2, channels, height, height) for channels, height in expected]


@pytest.mark.parametrize(("alpha", "width"), [("1", 64), ("0.25", 16), ("0.03", 2), ("2", 128)])
def test_width(alpha: str, width: int) -> None:
    net = network("resnet20", "digits,cbsa,origin", "--width_alpha", alpha)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["conv1.weight"] == (width, 3, 3, 3)
    assert shapes["layer3.2.conv2.0.weight"] == (4 * width, 4 * width, 3, 3)
    assert shapes["fc.weight"] == (10, 4 * width)


def test_a_width_without_channels_is_an_error() -> None:
    with pytest.raises(UserError, match="width_alpha"):
        network("resnet20", "digits,cbsa,origin", "--width_alpha", "0.001")


@pytest.mark.parametrize(
    ("options", "classes"),
    [(("digits",), 10), (("cifar100",), 100), (("cifar100", "--num_classes", "7"), 7), (("imagenet",), 1000)],
)
def test_classes(options: tuple[str, ...], classes: int) -> None:
    keyword, *rest = options
    net = network("resnet20", f"{keyword},cbsa,origin", *rest).eval()
    assert net(images(32, count=2)).shape == (2, classes)


@pytest.mark.parametrize("model", ["resnet50", "resnet101"])
def test_bottlenecks_stride_in_the_3x3(model: str) -> None:
    block = network(model, "digits,cbsa,origin").get_submodule("layer2.0")
    convs = [block.get_submodule(f"conv{k}.0") for k in (1, 2, 3)]
    assert [(c.kernel_size, c.stride) for c in convs] == [
        ((1, 1), (1, 1)),
        ((3, 3), (2, 2)),
        ((1, 1), (1, 1)),
    ]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(16, 8), (8, 8), (8, 32)]


# The order of a unit -------------------------------------------------------------------------------

# Convolution c, norm b and activation a of a unit with input x, which adds the shortcut's s.
UNITS: dict[str, Callable[[Op, Op, Op, Tensor, Tensor], Tensor]] = {
    "cbas": lambda c, b, a, x, s: a(b(c(x))) + s,
    "cbsa": lambda c, b, a, x, s: a(b(c(x)) + s),
    "cabs": lambda c, b, a, x, s: b(a(c(x))) + s,
    "bacs": lambda c, b, a, x, s: c(a(b(x))) + s,
    "bcas": lambda c, b, a, x, s: a(c(b(x))) + s,
}


def expected_branch(block: nn.Module, order: str, keywords: str, x: Tensor, branch: int) -> Tensor:
    """What branch `branch` puts out, from the convolutions and norms of the block."""
    units = sum(1 for name, _ in block.named_children() if re.fullmatch(r"conv\d", name))
    skip, block_wise = block.get_submodule("skip"), "origin" in keywords
    for k in range(1, units + 1):
        conv, norm = block.get_submodule(f"conv{k}.{branch}"), block.get_submodule(f"bn{k}.{branch}")
        after_sum = block_wise and "fix" in keywords.split(",") and order in ("cbas", "cbsa") and k == units
        activation: Op = (lambda value: value) if after_sum else torch.relu
        shortcut = torch.zeros(()) if block_wise else skip(x) if k == 1 else x
        x = UNITS[order](conv, norm, activation, x, shortcut)
    return x


def expected_sum(block: nn.Module, order: str, keywords: str, branches: Tensor, x: Tensor) -> Tensor:
    """What the block makes of the sum of its branches."""
    if "origin" not in keywords:
        return branches
    fix = "fix" in keywords.split(",")
    if fix and order.startswith("b"):
        branches = block.get_submodule("fix_bn")(branches)
    result = branches + block.get_submodule("skip")(x)
    return torch.relu(result) if fix and order in ("cbas", "cbsa") else result


def randomised(net: nn.Module) -> nn.Module:
    """Norms that are no identities, also in training mode."""
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return net


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("model", "name", "words"),
    [
        *itertools.product(["resnet20"], ["layer1.0", "layer2.0"], ["", "fix", "origin", "origin,fix"]),
        *itertools.product(["resnet50"], ["layer2.0"], ["origin", "origin,fix", "origin,fix,singleconv"]),
    ],
)
def test_block_computes_its_order(model: str, name: str, words: str, order: str) -> None:
    net = randomised(network(model, f"digits,{order},{words}"))
    block = net.get_submodule(name)
    channels = {"resnet50": 4 * WIDTH}.get(model, WIDTH)
    x = torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = expected_sum(block, order, words, expected_branch(block, order, words, x, 0), x)
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("words", ["", "origin"])
def test_modules_run_in_the_order_of_the_letters(order: str, words: str) -> None:
    block = network("resnet20", f"digits,{order},{words}").get_submodule("layer2.0")
    letters = {"conv": "c", "bn": "b", "relu": "a"}
    calls: list[str] = []
    for name, module in block.named_modules():
        if match := re.fullmatch(r"(conv|bn|relu)[12]\.0|skip", name):
            letter = letters.get(match[1] or "", "s")
            module.register_forward_hook(lambda m, i, out, letter=letter: calls.append(letter))
    block(torch.randn(2, WIDTH, 4, 4))
    without = order.replace("s", "")
    # The second unit of layer-wise skips adds its own input, through no module.
    assert "".join(calls) == (f"{without}{without}s" if words else f"{order}{without}")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model", ["resnet20", "resnet50"])
def test_norm_width_follows_the_order(model: str, order: str) -> None:
    block = network(model, f"digits,{order},origin").get_submodule("layer2.0")
    for k in (1, 2, 3) if model in BOTTLENECK else (1, 2):
        conv, norm = block.get_submodule(f"conv{k}.0"), block.get_submodule(f"bn{k}.0")
        wanted = conv.in_channels if order in ("bacs", "bcas") else conv.out_channels
        assert norm.num_features == wanted


# Shortcuts -----------------------------------------------------------------------------------------

POOL, CONV, NORM, ACT = nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The modules of a sequence that do something."""
    return [part for part in module.children() if not isinstance(part, nn.Identity)]


@pytest.mark.parametrize("skip", ["", "origin"])
@pytest.mark.parametrize(
    ("orders", "words", "expected"),
    [
        (("cbas", "cbsa", "cabs"), "", (POOL, CONV, NORM, ACT)),
        (("cbas", "cbsa", "cabs"), "fix", (POOL, CONV, NORM)),
        (("cbas", "cbsa", "cabs"), "singleconv", (CONV, NORM, ACT)),
        (("cbas", "cbsa", "cabs"), "singleconv,fix", (CONV, NORM)),
        (("bacs",), "", (POOL, NORM, ACT, CONV)),
        (("bacs",), "fix", (POOL, NORM, ACT, CONV, NORM)),
        (("bacs",), "singleconv", (NORM, ACT, CONV)),
        (("bcas",), "", (POOL, NORM, CONV, ACT)),
        (("bcas",), "fix", (POOL, NORM, CONV, ACT, NORM)),
        (("bcas",), "singleconv,fix", (NORM, CONV, ACT, NORM)),
    ],
)
def test_shortcut(
    orders: tuple[str, ...], words: str, expected: tuple[type[nn.Module], ...], skip: str
) -> None:
    for order in orders:
        net = network("resnet20", f"digits,{order},{words},{skip}")
        parts = parts_of(net.get_submodule("layer2.0.skip"))
        assert [type(part) for part in parts] == list(expected)
        [conv] = [part for part in parts if isinstance(part, nn.Conv2d)]
        assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (WIDTH, 2 * WIDTH, (1, 1))
        assert conv.stride == ((2, 2) if "singleconv" in words else (1, 1))
        for i, part in enumerate(parts):
            if isinstance(part, nn.BatchNorm2d):
                assert part.num_features == (WIDTH if i < parts.index(conv) else 2 * WIDTH)
            if isinstance(part, nn.AvgPool2d):
                assert (part.kernel_size, part.stride) == (2, 2)
        x = torch.randn(2, WIDTH, 6, 6)
        assert net.get_submodule("layer2.0.skip")(x).shape == (2, 2 * WIDTH, 3, 3)


def test_shortcut_that_only_widens() -> None:
    """A bottleneck's first block changes channels at stride 1: nothing is pooled."""
    parts = parts_of(network("resnet50", "digits,cbsa,origin").get_submodule("layer1.0.skip"))
    assert [type(part) for part in parts] == [CONV, NORM, ACT]


@pytest.mark.parametrize("name", ["layer1.0", "layer1.1", "layer2.1"])
def test_shortcut_of_equal_shapes_is_the_identity(name: str) -> None:
    skip = network("resnet20", "digits,cbsa,origin").get_submodule(f"{name}.skip")
    assert not list(skip.parameters())
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(skip(x), x)


@pytest.mark.parametrize(("words", "quantized"), [("", True), ("real_skip", False)])
def test_shortcut_in_full_precision(words: str, quantized: bool) -> None:
    net = network("resnet20", f"digits,cbsa,origin,dorefa,lsq,{words}", *QUANTIZED)
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    low = {name for name, m in layers.items() if isinstance(m, QuantLayer)}
    shortcuts = {name for name in layers if ".skip." in name}
    assert len(shortcuts) == 2
    assert layers.keys() - low == {"conv1"} | (set() if quantized else shortcuts)


# Stem and head -------------------------------------------------------------------------------------


def executed(net: nn.Module, x: Tensor) -> tuple[list[type[nn.Module]], list[type[nn.Module]]]:
    """The kinds of modules that ran before the first and after the last stage."""
    calls: list[tuple[str, type[nn.Module]]] = []
    for name, module in net.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Identity | nn.Sequential):
            module.register_forward_hook(lambda m, i, out, name=name: calls.append((name, type(m))))
    net(x)
    inside = [i for i, (name, _) in enumerate(calls) if name.startswith("layer")]
    return [kind for _, kind in calls[: inside[0]]], [kind for _, kind in calls[inside[-1] + 1 :]]


MAX = nn.MaxPool2d
HEAD = [nn.AdaptiveAvgPool2d, nn.Linear]


@pytest.mark.parametrize(
    ("keywords", "stem", "head"),
    [
        ("imagenet,cbsa", [CONV, MAX, NORM, ACT], HEAD),
        ("imagenet,cbsa,fix_pooling", [CONV, NORM, ACT, MAX], HEAD),
        ("imagenet,bacs,preBN", [CONV, MAX], [NORM, *HEAD]),
        ("imagenet,bacs,preBN,fix_pooling", [CONV, MAX], [NORM, *HEAD]),
        ("cifar10,cbsa", [CONV, NORM, ACT], HEAD),
        ("cifar100,cbsa,fix_pooling", [CONV, NORM, ACT], HEAD),
        ("digits,bcas,preBN", [CONV], [NORM, *HEAD]),
    ],
)
@pytest.mark.parametrize("model", ["resnet18", "resnet20"])
def test_stem_and_head(
    model: str, keywords: str, stem: list[type[nn.Module]], head: list[type[nn.Module]]
) -> None:
    net = network(model, keywords)
    assert executed(net, images(64, count=2)) == (stem, head)
    conv = net.get_submodule("conv1")
    imagenet = "imagenet" in keywords
    assert (conv.kernel_size, conv.stride, conv.padding) == (
        ((7, 7), (2, 2), (3, 3)) if imagenet else ((3, 3), (1, 1), (1, 1))
    )
    assert conv.bias is None


def test_first_and_last_layer_stay_in_full_precision() -> None:
    net = network("resnet20", "digits,cbsa,origin,dorefa,lsq", *QUANTIZED)
    assert not isinstance(net.get_submodule("conv1"), QuantLayer)
    assert not isinstance(net.get_submodule("fc"), QuantLayer)


def test_head_norm_has_the_width_of_the_last_stage() -> None:
    net = network("resnet50", "digits,bacs,origin,preBN")
    norms = [m for name, m in net.named_modules() if name.startswith("bn2") and isinstance(m, nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == [8 * WIDTH * 4]


# Branches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [2, 5])
@pytest.mark.parametrize(
    "keywords", ["digits,cabs", "digits,cbsa,origin,fix", "digits,bacs,origin,fix,preBN"]
)
def test_a_block_is_the_weighted_sum_of_its_branches(keywords: str, base: int) -> None:
    net = randomised(network("resnet20", keywords, "--base", str(base)))
    block = net.get_submodule("layer2.0")
    scales = list(block.get_submodule("scales").parameters())
    assert [scale.tolist() for scale in scales] == [[pytest.approx(1 / base)]] * base
    order = keywords.split(",")[1]
    x = torch.randn(4, WIDTH, 8, 8)
    with torch.no_grad():
        for j, scale in enumerate(scales):
            scale.fill_(0.3 + j)
        branches = [expected_branch(block, order, keywords, x, j) * (0.3 + j) for j in range(base)]
        expected = expected_sum(block, order, keywords, torch.stack(branches).sum(0), x)
        torch.testing.assert_close(block(x), expected)
    assert len({float(branch.sum()) for branch in branches}) == base  # each has weights of its own


def test_every_branch_learns() -> None:
    net = network("resnet20", "digits,cabs,origin,dorefa,lsq", "--base", "3", *QUANTIZED)
    functional.cross_entropy(net(images(16, count=8)), torch.arange(8)).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert len([name for name, _ in net.named_parameters() if ".scales." in name]) == 3 * sum(
        BLOCKS["resnet20"]
    )


def test_one_branch_has_no_scales() -> None:
    net = network("resnet20", "digits,cabs")
    assert not [name for name, _ in net.named_parameters() if "scales" in name]


# Initialisation ------------------------------------------------------------------------------------


def test_initialisation() -> None:
    """Convolutions from N(0, 2 / (out * kh * kw)), norms the identity, `fc` within 1/sqrt(in)."""
    net = network("resnet18", "imagenet,cbsa,origin", "--width_alpha", "0.5")
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            wanted = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
            count = weight.numel()
            # Five standard errors of the estimates from `count` normal numbers.
            assert weight.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(2 * count)), name
            assert abs(weight.mean().item()) < 5 * wanted / math.sqrt(count), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    fc = net.get_submodule("fc")
    assert 0.9 / math.sqrt(256) < fc.weight.abs().max().item() <= 1 / math.sqrt(256)


def test_the_seed_decides_the_weights() -> None:
    first, second = network("resnet20", "digits,cbsa"), network("resnet20", "digits,cbsa")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# Modes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", ["digits,cbsa,origin", "digits,bacs,preBN,dorefa,lsq"])
def test_evaluation_changes_nothing(keywords: str) -> None:
    net = network("resnet20", keywords, *(QUANTIZED if "lsq" in keywords else ())).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        first, second = net(images(16)), net(images(16))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
