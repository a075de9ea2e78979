"""The keyword variants of the flexible ResNet that no recorded vector covers, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model import layer
from model.build import build
from model.resnet import Block, ResNet
from utils.config import ModelConfig
from utils.errors import UserError
from utils.resolve import read

SMALL = "--model resnet20 --width_alpha 0.0625 --num_classes 5 --input_size 16 --dataset fake"
QUANTIZED = "--fm_enable --wt_enable --fm_bit 2 --wt_bit 2"


def network(keywords: str, options: str = "") -> ResNet:
    """A small network of these keywords."""
    torch.manual_seed(0)
    made = build(read(f"{SMALL} --keyword {keywords} {options}".split()).model)
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


def test_zero_initialised_norms_make_blocks_shortcuts() -> None:
    model = network("cifar10,cbsa,origin,fix,zir").eval()
    x = torch.randn(2, 4, 8, 8).abs()
    assert torch.equal(model.get_submodule("layer1.1")(x), x)


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


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8, 9, 10])
def test_prone_keeps_the_size_of_a_3x3_convolution(size: int, stride: int) -> None:
    config = ModelConfig()
    module = layer.ProneConv(3, 5, stride, config, norm_inside=False)
    x = torch.randn(2, 3, size, size)
    reference = nn.Conv2d(3, 5, 3, stride=stride, padding=1)(x)
    assert module(x).shape == reference.shape


def test_prone_pads_half_of_the_remainder_on_each_side() -> None:
    """With weights that copy each pixel of the block, the output is the input where nothing was cut off."""
    module = layer.ProneConv(1, 1, 1, ModelConfig(), norm_inside=False)
    nn.init.dirac_(module.conv.weight)
    x = torch.arange(49.0).reshape(1, 1, 7, 7)
    assert torch.equal(module(x), x)


def test_space_to_depth_stem_is_a_strided_convolution() -> None:
    """Kernel 1 after space-to-depth by 4 equals a 4x4 convolution of stride 4 with the weights rearranged."""
    stem = layer.SpaceToDepthConv(3, 6, 4, 1, ModelConfig(), full_precision=True)
    x = torch.randn(2, 3, 8, 8)
    weight = stem.conv.weight.reshape(6, 3, 4, 4)
    torch.testing.assert_close(stem(x), functional.conv2d(x, weight, stride=4))


def test_reverse_norm_by_hand() -> None:
    module = layer.ReverseBatchNorm2d(3)
    nn.init.uniform_(module.weight, 0.5, 2)
    nn.init.uniform_(module.bias)
    x = torch.randn(4, 3, 5, 5)
    y = x * module.weight.reshape(1, 3, 1, 1) + module.bias.reshape(1, 3, 1, 1)

    def normalise(y: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (y - mean.reshape(1, 3, 1, 1)) / (var.reshape(1, 3, 1, 1) + 1e-5).sqrt()

    expected = normalise(y, y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), unbiased=False))
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.running_mean, 0.1 * y.mean(dim=(0, 2, 3)).detach())
    assert module.num_batches_tracked == 1
    module.eval()
    torch.testing.assert_close(module(x), normalise(y, module.running_mean, module.running_var))


@pytest.mark.parametrize(("keyword", "learns"), [("static-bn", True), ("freeze-bn", False)])
def test_fixed_statistics_stay(keyword: str, learns: bool) -> None:
    model = network(f"cifar10,cbsa,origin,fix,{keyword}")
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    model(torch.randn(8, 3, 16, 16))
    assert before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    norms = [m for m in model.modules() if isinstance(m, layer.StaticBatchNorm2d)]
    assert all(norm.weight.requires_grad is learns for norm in norms)


def test_first_and_last_layer_are_quantized_on_request() -> None:
    options = f"{QUANTIZED} --wt_quant_group 1"
    for keywords, expected in (("cifar10,cbsa,dorefa", False), ("cifar10,cbsa,dorefa,first-last", True)):
        model = network(keywords, options)
        assert hasattr(model.conv1, "quant_weight") is expected
        assert hasattr(model.fc, "quant_weight") is expected


BAD = {
    "bottleneck": ("--model resnet50 --keyword imagenet,cbsa", "origin"),
    "group-norm": (
        "--model resnet20 --width_alpha 0.25 --keyword cifar10,cbsa,group-norm --fm_quant_group 3",
        "divide",
    ),
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
        build(read(options.split()).model)
