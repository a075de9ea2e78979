"""The keyword variants of the flexible ResNet that no recorded vector covers, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers import space_to_depth
from model.layers.norms import ReverseBatchNorm2d, StaticBatchNorm2d
from model.layers.quantized import quantized_layers, quantizers
from model.networks.build import build_network
from model.networks.resnet import Block, ResNet
from utils.config.resolve import read
from utils.config.schema import ModelConfig
from utils.errors import UserError

SMALL = "--model resnet20 --width_alpha 0.0625 --num_classes 5 --input_size 16 --dataset fake"
QUANTIZED = "--fm_enable --wt_enable --fm_bit 2 --wt_bit 2"


def network(keywords: str, options: str = "") -> ResNet:
    """A small network of these keywords."""
    torch.manual_seed(0)
    made = build_network(read(f"{SMALL} --keyword {keywords} {options}".split()).model)
    assert isinstance(made, ResNet)
    return made


VARIANTS = {
    "DCHR": "cifar10,cbas,origin,fix,DCHR",
    "DCHR layer-wise": "cifar10,cbas,DCHR",
    "identify_norm": "cifar10,cbsa,origin,fix,identify_norm",
    "zir": "cifar10,cbsa,origin,fix,zir",
    "patch": "cifar10,bacs,origin,preBN,patch_preBN_stem",
    "patch and fix_pooling": "cifar10,bacs,origin,preBN,patch_preBN_stem,fix_pooling",
    "TResNetStem": "imagenet,cbsa,origin,fix,TResNetStem",
    "TResNetStemMaxPool": "imagenet,cbsa,origin,fix,TResNetStemMaxPool",
    "prone": "cifar10,cbsa,origin,fix,prone",
    "prone, norm inside": "cifar10,cbas,origin,fix,prone,bn_before_restore",
    "prone without downsampling": "cifar10,cabs,prone,no_prone_downsample",
    "lossless downsampling": "cifar10,cbsa,origin,fix,ReShapeResolution",
    "fixup": "cifar10,cbsa,origin,fix,fixup",
    "fixup with biases": "cifar10,cbas,origin,fix,fixup,bias",
    "fixup cabs": "cifar10,cabs,fixup,bias",
    "group-net stem": "cifar10,cabs,fix,group-net",
    "PReLU": "cifar10,cbsa,origin,fix,PReLU",
    "RPReLU": "cifar10,cbsa,fix_pooling,real_skip,RPReLU",
    "RPReLU, activation first": "cifar10,bacs,RPReLU",
    "RPReLU, lossless downsampling": "cifar10,cbas,ReShapeResolution,RPReLU",
    "ReLU6": "cifar10,cbsa,origin,fix,ReLU6",
    "LReLU": "cifar10,cbsa,origin,fix,LReLU",
    "NReLU": "cifar10,cbsa,NReLU",
    "reverse-bn": "cifar10,cbsa,origin,fix,reverse-bn",
    "static-bn": "cifar10,cbsa,origin,fix,static-bn",
    "freeze-bn": "cifar10,cbsa,origin,fix,freeze-bn",
    "instance-norm": "cifar10,cbsa,origin,fix,instance-norm",
    "group-norm": "cifar10,cbsa,origin,fix,group-norm",
    "first-last": "cifar10,cbsa,origin,fix,first-last",
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_every_parameter(name: str, quantized: bool) -> None:
    options = "--fm_quant_group 2" if name == "group-norm" else ""
    model = network(
        VARIANTS[name] + (",dorefa,lsq" if quantized else ""), f"{options} {QUANTIZED if quantized else ''}"
    )
    # Zero-initialised last convolutions and norms let nothing pass to what is before them.
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for block in model.modules():
        if isinstance(block, Block) and "zir" in name:
            for norm in getattr(block, f"bn{block.units}"):
                nn.init.ones_(norm.weight)
    size = 32 if "imagenet" in VARIANTS[name] else 16
    output = model(torch.randn(8, 3, size, size))
    assert output.shape == (8, 5)
    functional.cross_entropy(output, torch.arange(8) % 5).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_repeated_channels_are_pooled_copies() -> None:
    model = network("cifar10,cbas,origin,fix,DCHR")
    block = model.get_submodule("layer2.0")
    assert isinstance(block, Block)
    x = torch.randn(2, 4, 8, 8)
    pooled = functional.avg_pool2d(x, 2)
    assert torch.equal(block.skip(x), torch.cat([pooled, pooled], dim=1))
    assert not list(block.skip.parameters())


@pytest.mark.parametrize(
    "words",
    [
        "cbsa,origin,fix", "cbas,origin,fix", "cbsa,origin,fix,static-bn",
        "cbsa,origin,fix,group-norm", "cbsa,origin,fix,prone", "cbsa,origin,fix,prone,bn_before_restore",
        "bacs,origin,fix", "bcas,origin,fix", "cabs,origin,fix", "cabs,origin,fix --base 2",
    ],
)  # fmt: skip
def test_zero_initialised_norms_make_blocks_shortcuts(words: str) -> None:
    """And they learn: no branch is lost."""
    model = network(f"cifar10,zir,{words}").eval()
    block = model.get_submodule("layer1.1")
    x = torch.randn(2, 4, 8, 8).abs()
    assert torch.equal(block(x), x)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block.train()(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(block.eval()(x), x)
    assert not any("zir" in text for text in read(f"{SMALL} --keyword cifar10,zir,{words}".split()).warnings)


REVERSED_ZERO = "zir: a norm of reverse-bn has no gradient"
ZERO = "zir: an activation follows the norm that starts at zero"
IDLE = {
    "cbsa,origin,fix,real_skip,DCHR": "the keyword real_skip has no effect beside DCHR",
    "cbsa,origin,fix,real_skip,DCHR,ReShapeResolution": "the keyword DCHR has no effect beside ReShapeResolution",
    "cbsa,origin,fix,singleconv,DCHR": "the keyword singleconv has no effect beside DCHR",
    "cbsa,origin,singleconv,ReShapeResolution": "the keyword singleconv has no effect beside ReShapeResolution",
    "cbsa,origin,DCHR,ReShapeResolution": "the keyword DCHR has no effect beside ReShapeResolution",
    "bacs,origin,preBN,group-net": "the keyword group-net has no effect beside preBN",
    "bacs,origin,preBN,group-net,patch_preBN_stem": "the keyword group-net has no effect beside preBN",
    "bacs,origin,preBN,patch_preBN_stem,fix_pooling,group-net": "",
    "bacs,origin,preBN,fix_pooling": "the keyword fix_pooling has no effect beside preBN",
    "cbsa,origin,fix,zir,instance-norm": "the keyword zir has no effect beside instance-norm",
    **{
        f"cbsa,origin,fix,fixup,{norm}": f"the keyword {norm} has no effect beside fixup"
        for norm in ("group-norm", "static-bn", "freeze-bn", "reverse-bn", "instance-norm")
    },
    "cbsa,origin,fix,fixup,ReShapeResolution,static-bn": "",
    "cbsa,origin,zir": ZERO,
    "cbsa,zir": "",
    "cbsa,zir,reverse-bn": REVERSED_ZERO,
    "cbas,zir": ZERO,
    "bacs,preBN,zir": ZERO,
    "bcas,origin,preBN,zir": ZERO,
    "bcas,origin,preBN,zir,PReLU": "",
}


@pytest.mark.parametrize("words", IDLE)
def test_words_that_do_nothing_beside_others_are_warnings(words: str) -> None:
    """A warning and no difference, or a difference and no warning."""
    warnings = read(f"{SMALL} --keyword cifar10,{words}".split()).warnings
    assert all(IDLE[words] and IDLE[words] in warning for warning in warnings)
    assert bool(warnings) == bool(IDLE[words])
    if warnings == () or IDLE[words] in (ZERO, REVERSED_ZERO):
        return
    idle = warnings[0].split()[2]
    others = words.replace(f",{idle}", "")
    kept, left = (network(f"cifar10,dorefa,lsq,{part}", QUANTIZED) for part in (words, others))
    assert kept.state_dict().keys() == left.state_dict().keys()
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(kept(x), left(x))


@pytest.mark.parametrize(
    "words", [words for words, message in IDLE.items() if message in (ZERO, REVERSED_ZERO)]
)
def test_norms_behind_whose_zero_an_activation_stands_never_learn(words: str) -> None:
    model = network(f"cifar10,{words}")
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    block = model.get_submodule("layer2.1")
    gradient = block.get_parameter("bn2.0.weight").grad
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize(("words", "quantized"), [("", True), (",real_skip", False)])
def test_real_skip_keeps_the_lossless_downsampling_in_full_precision(words: str, quantized: bool) -> None:
    model = network(f"cifar10,cbsa,origin,fix,ReShapeResolution,dorefa,lsq{words}", QUANTIZED)
    names = [name for name, _ in quantized_layers(model)]
    assert ("layer2.0.shrink.0.conv" in names) is quantized
    assert "layer2.0.conv1.0" in names


@pytest.mark.parametrize(("requested", "groups"), [(2, (2, 2)), (-2, (2, 4)), (-4, (1, 2)), (1, (1, 1))])
def test_groups_of_a_group_norm(requested: int, groups: tuple[int, int]) -> None:
    """So many, or of so many channels each."""
    model = network("cifar10,cbsa,origin,group-norm", f"--fm_quant_group {requested}")
    norms = [model.get_submodule(f"layer{stage}.1.bn1.0") for stage in (1, 2)]
    assert all(isinstance(norm, nn.GroupNorm) for norm in norms)
    assert tuple(norm.num_groups for norm in norms if isinstance(norm, nn.GroupNorm)) == groups


def test_fixup_starts_as_published() -> None:
    """First convolutions: std sqrt(2 / (out * 9)) * B^(-1/2), B = 9 blocks; the last and fc: zero."""
    model = network("cifar10,cbsa,origin,fix,fixup,bias", "--width_alpha 1")
    stds = []
    for block in model.modules():
        if isinstance(block, Block):
            first, last = block.get_parameter("conv1.0.weight"), block.get_parameter("conv2.0.weight")
            assert not last.any()
            stds.append(float(first.detach().std()) / (2 / (first.shape[0] * 9)) ** 0.5)
    assert len(stds) == 9
    assert torch.tensor(stds).mean() == pytest.approx(1 / 3, rel=0.02)
    assert not model.fc.weight.any()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_fixup_biases_where_the_paper_has_them() -> None:
    """A basic block by hand, in the order of the paper's figure 1, with a convolving shortcut."""
    model = network("cifar10,cbsa,origin,fix,fixup,bias,singleconv")
    block = model.get_submodule("layer2.0")
    assert isinstance(block, Block)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    p = dict(block.named_parameters())
    x = torch.randn(2, 4, 8, 8)
    y = functional.conv2d(x + p["fixup_bias1a"], p["conv1.0.weight"], stride=2, padding=1) + p["fixup_bias1b"]
    y = functional.conv2d(functional.relu(y) + p["fixup_bias2a"], p["conv2.0.weight"], padding=1)
    y = y * p["fixup_scale"] + p["fixup_bias2b"]
    skip = functional.conv2d(x + p["fixup_bias1a"], p["skip.1.weight"], stride=2)
    torch.testing.assert_close(block(x), functional.relu(y + skip))


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [(7, 1, 7), (8, 1, 8), (9, 1, 9), (7, 2, 4), (8, 2, 4), (9, 2, 5), (10, 2, 6), (14, 2, 8)],
)
def test_sizes_that_space_to_depth_gives(size: int, stride: int, expected: int) -> None:
    """Those of a 3x3 convolution, but for an even remainder: both halves of the padding stay."""
    module = space_to_depth.ProneConv(3, 5, stride, ModelConfig(), norm_inside=False)
    assert module(torch.randn(2, 3, size, 8)).shape == (2, 5, expected, 8 // stride)


@pytest.mark.parametrize("words", ["singleconv", "", "DCHR", "singleconv,no_prone_downsample", "bacs"])
def test_strided_layers_beside_space_to_depth_pad_as_it_does(words: str) -> None:
    """6 pixels, stride 2: padded to 8 in the branch and in the shortcut, as published code does with singleconv."""
    order = words if words == "bacs" else f"cbsa,{words}"
    model = network(f"cifar10,origin,fix,prone,{order}".rstrip(","))
    block = model.get_submodule("layer2.0")
    assert isinstance(block, Block)
    block.eval()
    x = torch.randn(2, 4, 6, 10)
    assert block(x).shape == (2, 8, 4, 6)
    if words.startswith("singleconv"):
        padded = functional.pad(x, (1, 1, 1, 1))
        expected = block.skip(padded)
        found: list[Tensor] = []
        block.skip[2].register_forward_hook(lambda _, __, output: found.append(output))
        block(x)
        assert torch.equal(found[-1], expected)
    assert model(torch.randn(2, 3, 12, 12)).shape == (2, 5)


def test_prone_pads_half_of_the_remainder_on_each_side() -> None:
    """With weights that copy each pixel of the block, the output is the input where nothing was cut off."""
    module = space_to_depth.ProneConv(1, 1, 1, ModelConfig(), norm_inside=False)
    nn.init.dirac_(module.conv.weight)
    x = torch.arange(49.0).reshape(1, 1, 7, 7)
    assert torch.equal(module(x), x)


def test_space_to_depth_stem_is_a_strided_convolution() -> None:
    """Kernel 1 after space-to-depth by 4 equals a 4x4 convolution of stride 4 with the weights rearranged."""
    stem = space_to_depth.SpaceToDepthConv(3, 6, 4, 1, ModelConfig(), full_precision=True)
    x = torch.randn(2, 3, 8, 8)
    weight = stem.conv.weight.reshape(6, 3, 4, 4)
    torch.testing.assert_close(stem(x), functional.conv2d(x, weight, stride=4))


REVERSED = {
    "resnet20": "--keyword cifar10,cbsa,origin,fix,reverse-bn",
    "pytorch-resnet18": "--keyword cifar10,reverse-bn",
    "mobilenetv1": "--keyword cifar10,reverse-bn",
    "mobilenetv2": "--keyword cifar10,reverse-bn",
    "vgg_small": "--keyword cifar10,reverse-bn",
    "nin": "--keyword cifar10,reverse-bn",
}


@pytest.mark.parametrize("model", REVERSED)
def test_reverse_norms_have_their_affine_part_on_both_sides(model: str) -> None:
    """As published, in training and in evaluation, in every network that knows the keyword; in float64."""
    width = "" if model.startswith("pytorch") else "--width_alpha 0.25"
    net = build_network(
        read(f"--dataset fake --model {model} --num_classes 5 {width} {REVERSED[model]}".split()).model
    )
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(type(norm) is ReverseBatchNorm2d for norm in norms)
    norm = norms[0]
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    seen: list[tuple[Tensor, Tensor]] = []
    # A clone: torchvision's activations change it in place.
    norm.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output.clone())))
    weight, bias = (each.detach().double().reshape(1, -1, 1, 1) for each in (norm.weight, norm.bias))
    for training in (True, False):
        net.train(training)(torch.randn(4, 3, 32, 32))
        x, found = seen[-1]
        y = x.double() * weight + bias
        mean, var = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), unbiased=False)
        if training:
            torch.testing.assert_close(norm.running_mean, 0.1 * mean.float(), check_dtype=False)
        else:
            mean, var = norm.running_mean.double(), norm.running_var.double()
        normed = (y - mean.reshape(1, -1, 1, 1)) / (var.reshape(1, -1, 1, 1) + 1e-5).sqrt()
        torch.testing.assert_close(found, (normed * weight + bias).float(), rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(("keyword", "learns"), [("static-bn", True), ("freeze-bn", False)])
def test_fixed_statistics_stay(keyword: str, learns: bool) -> None:
    model = network(f"cifar10,cbsa,origin,fix,{keyword}")
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    model(torch.randn(8, 3, 16, 16))
    assert before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    norms = [m for m in model.modules() if isinstance(m, StaticBatchNorm2d)]
    assert all(norm.weight.requires_grad is learns for norm in norms)


def test_first_and_last_layer_are_quantized_on_request() -> None:
    options = f"{QUANTIZED} --wt_quant_group 1"
    for keywords, expected in (("cifar10,cbsa,dorefa", False), ("cifar10,cbsa,dorefa,first-last", True)):
        model = network(keywords, options)
        assert hasattr(model.conv1, "quant_weight") is expected
        assert hasattr(model.fc, "quant_weight") is expected


@pytest.mark.parametrize(
    ("model", "words", "first"),
    [
        ("resnet20", "cbsa", "conv1"),
        ("resnet20", "cbsa,TResNetStemMaxPool", "conv1.conv"),
        ("pytorch-resnet18", "dorefa", "conv1"),
    ],
)
def test_the_first_layer_may_have_signed_levels(model: str, words: str, first: str) -> None:
    """The state stays the same, and so do the levels of all other layers."""
    line = f"--model {model} --keyword cifar10,lsq,first-last,{words} --fm_enable --wt_enable".split()
    unsigned, signed = (build_network(read([*line, *more]).model) for more in ([], ["--fm_first_signed"]))
    assert list(unsigned.state_dict()) == list(signed.state_dict())
    found = {
        name: (quantizer.config.half_range, other.config.half_range)
        for (name, quantizer), (_, other) in zip(quantizers(unsigned), quantizers(signed), strict=True)
        if name.endswith("quant_activation")
    }
    assert {name for name, (before, after) in found.items() if before != after} == {
        f"{first}.quant_activation"
    }


BAD = {
    "bottleneck": ("--model resnet50 --keyword imagenet,cbsa", "origin"),
    "group-norm": (
        "--model resnet20 --width_alpha 0.25 --keyword cifar10,cbsa,group-norm --fm_quant_group 3",
        r"^bn1.0, .* group-norm: --fm_quant_group 3 .* does not divide its 16 channels",
    ),
    "group-norm, size": (
        "--model resnet20 --width_alpha 0.25 --keyword cifar10,cbsa,group-norm --fm_quant_group -32",
        r"^bn1.0, .*-32 \(groups of 32\) does not divide its 16 channels",
    ),
    "fixup identify_norm": ("--keyword cifar10,cbsa,fixup,identify_norm", "fixup contradicts identify_norm"),
    "fixup inside": ("--keyword cifar10,cbsa,fixup,prone,bn_before_restore", "fixup contradicts bn_before"),
    "zir freeze-bn": ("--keyword cifar10,cbsa,zir,freeze-bn", "zir contradicts freeze-bn"),
    "prone preBN": ("--keyword cifar10,bacs,preBN,prone", "preBN contradicts prone"),
    "inside": ("--keyword cifar10,cabs,prone,bn_before_restore", "cbas or cbsa"),
    "fixup bacs": ("--keyword cifar10,bacs,fixup", "cbas or cbsa"),
    "bias alone": ("--keyword cifar10,cbsa,bias", "bias needs fixup"),
    "order letters": ("--keyword cifar10,cbsa,ReShapeResolution --order xy", "letters"),
    "order without c": ("--keyword cifar10,cbsa,ReShapeResolution --order ba", "letters"),
    "stem kernel alone": ("--keyword imagenet,cbsa --stem_kernel 3", "TResNetStem"),
    "stem kernel": ("--keyword imagenet,cbsa,TResNetStem --stem_kernel 5", "1 or 3"),
    "pytorch width": ("--model pytorch-resnet18 --keyword imagenet --width_alpha 0.5", "one width"),
    "two norms": ("--keyword cifar10,cbsa,static-bn,freeze-bn", "contradicts"),
}


@pytest.mark.parametrize("name", BAD)
def test_combinations_without_a_network(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(UserError, match=message):
        build_network(read(options.split()).model)
