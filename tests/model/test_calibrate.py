"""Initial quantizer parameters from weights and images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.calibrate import initialise_ranges, percentile_clip
from model.layers.convolution import QuantConv2d
from model.layers.quantized import quantizers
from model.networks.build import build_network
from utils.config.resolve import read
from utils.config.schema import QuantConfig

BOTH = ("--fm_enable", "--wt_enable")


def quant(*options: str, keywords: str = "dorefa,lsq") -> QuantConfig:
    """The quantizers of a command line."""
    return read(["--keyword", f"digits,cbsa,{keywords}", *options]).model.quant


def chain(config: QuantConfig) -> nn.Sequential:
    """Two quantized convolutions with a ReLU between them."""
    torch.manual_seed(0)
    first = QuantConv2d(3, 4, 3, padding=1, bias=False)
    second = QuantConv2d(4, 6, 3, stride=2, padding=1, bias=False)
    for name, layer in (("first", first), ("second", second)):
        layer.build_quantizers(config, name)
    return nn.Sequential(first, nn.ReLU(), second)


def images(*shape: int) -> Tensor:
    return torch.rand(*(shape or (5, 3, 8, 8)), generator=torch.Generator().manual_seed(1))


def clip(layer: nn.Module, part: str) -> np.ndarray:
    return layer.get_submodule(part).clip_val.detach().double().numpy()


def expected_clip(values: Tensor, top: float, axes: tuple[int, ...] | None = None) -> np.ndarray:
    """`top` steps of 2 * mean|x| / sqrt(top)."""
    mean = np.abs(values.detach().double().numpy()).mean(axis=axes, keepdims=axes is not None)
    return top * 2 * mean / np.sqrt(top)


@pytest.mark.parametrize(
    ("bits", "top", "weight_top"), [("2", 3.0, 1.5), ("3", 7.0, 3.5), ("4", 15.0, 7.5), ("8", 255.0, 127.5)]
)
def test_initial_step(bits: str, top: float, weight_top: float) -> None:
    """Activations in [0, c] have 2^b - 1 steps; weights in [-c, c] have their top half as many above 0."""
    net = chain(quant(*BOTH, "--fm_bit", bits, "--wt_bit", bits))
    assert initialise_ranges(net, images()) == 4
    np.testing.assert_allclose(clip(net[0], "quant_activation"), [expected_clip(images(), top)], rtol=1e-5)
    for layer in (net[0], net[2]):
        wanted = expected_clip(layer.weight, weight_top, axes=(1, 2, 3))
        assert wanted.shape == (layer.out_channels, 1, 1, 1)
        np.testing.assert_allclose(clip(layer, "quant_weight"), wanted, rtol=1e-5)


def test_initial_step_of_ternary_weights_per_tensor() -> None:
    net = chain(quant("--wt_enable", "--wt_level", "3", "--wt_quant_group", "1"))
    assert initialise_ranges(net, images()) == 2
    wanted = expected_clip(net[2].weight, 1.0).reshape(1, 1, 1, 1)
    np.testing.assert_allclose(clip(net[2], "quant_weight"), wanted, rtol=1e-5)


def test_initial_step_of_groups() -> None:
    """Two groups of two channels of an input, one value each."""
    layer = QuantConv2d(4, 6, 3)
    layer.build_quantizers(quant("--fm_enable", "--fm_bit", "2", "--fm_quant_group", "-2"), "layer")
    x = images(5, 4, 8, 8)
    initialise_ranges(layer, x)
    halves = x.reshape(5, 2, 2, 8, 8)
    wanted = expected_clip(halves, 3.0, axes=(0, 2, 3, 4)).reshape(1, 2, 1, 1)
    np.testing.assert_allclose(clip(layer, "quant_activation"), wanted, rtol=1e-5)


def test_normalised_weights_are_initialised_as_the_quantizer_sees_them() -> None:
    net = chain(quant("--wt_enable", "--wt_bit", "2", "--wt_adaptive", "var-mean"))
    initialise_ranges(net, images())
    rows = net[2].weight.detach().double().flatten(1)
    normal = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
    wanted = expected_clip(normal, 1.5, axes=(1,)).reshape(6, 1, 1, 1)
    np.testing.assert_allclose(clip(net[2], "quant_weight"), wanted, rtol=1e-5)


def test_padding_counts_where_it_is_quantized() -> None:
    """Levels around zero without one at zero: the padded positions take a level, so they are seen too."""
    net = chain(quant("--fm_enable", "--fm_bit", "2", "--fm_half_range"))
    initialise_ranges(net, images())
    padded = functional.pad(images(), (1, 1, 1, 1))
    np.testing.assert_allclose(clip(net[0], "quant_activation"), [expected_clip(padded, 1.5)], rtol=1e-5)


def test_each_layer_sees_its_predecessors_quantized() -> None:
    net = chain(quant(*BOTH, "--fm_bit", "2", "--wt_bit", "2"))
    full = functional.relu(functional.conv2d(images(), net[0].weight, padding=1))
    initialise_ranges(net, images())
    # The first layer by hand: two-bit activations in [0, c], two-bit weights in [-k, k] per channel.
    c, k = (torch.from_numpy(clip(net[0], part)) for part in ("quant_activation", "quant_weight"))
    x = (images().double() / c).clamp(0, 1).mul(3).round() * c / 3
    weight = (((net[0].weight.double() / k).clamp(-1, 1) + 1) / 2 * 3).round() * 2 / 3 * k - k
    hidden = functional.relu(functional.conv2d(x, weight, padding=1))
    wanted = expected_clip(hidden, 3.0)
    np.testing.assert_allclose(clip(net[2], "quant_activation"), [wanted], rtol=1e-4)
    assert abs(wanted / expected_clip(full, 3.0) - 1) > 0.02  # quantization is visible in it


def test_outputs_are_initialised_from_the_quantized_convolution() -> None:
    net = chain(quant(*BOTH, "--ot_enable", "--ot_bit", "4", "--fm_bit", "2", "--wt_bit", "2"))
    assert initialise_ranges(net, images()) == 6
    layer = net[0]
    with torch.no_grad():
        x, weight = layer.quant_activation(images()), layer.quant_weight(layer.weight)
    wanted = expected_clip(functional.conv2d(x, weight, padding=1), 7.5)
    np.testing.assert_allclose(clip(layer, "quant_output"), [wanted], rtol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "changed", "count"),
    [
        ("dorefa,lsq", {"clip_val"}, 40),
        ("pact", {"clip_val"}, 20),
        ("dorefa", set(), 0),
        ("lq", {"basis"}, 40),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_only_quantizer_parameters_change(
    keywords: str, changed: set[str], count: int, training: bool
) -> None:
    torch.manual_seed(0)
    argv = ["--model", "resnet20", "--width_alpha", "0.0625", "--keyword", f"digits,cbsa,origin,{keywords}"]
    net = build_network(read([*argv, *BOTH, "--fm_bit", "2", "--wt_bit", "2", "--stable", "3"]).model).train(
        training
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert len(list(quantizers(net))) == 40
    assert initialise_ranges(net, images()) == count
    after = net.state_dict()
    assert {
        name.rpartition(".")[2] for name in after if not torch.equal(after[name], before[name])
    } == changed
    assert all(module.training == training for module in net.modules())
    assert all(not (module._forward_hooks or module._forward_pre_hooks) for module in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_initialising_again_changes_nothing() -> None:
    net = chain(quant(*BOTH, "--fm_bit", "2", "--wt_bit", "2"))
    initialise_ranges(net, images())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    initialise_ranges(net, images())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("keywords", ["dorefa,lsq", "pact", "lq"])
def test_a_small_input_is_rebuilt_better(keywords: str) -> None:
    """Values up to 0.05, far below the initial boundary of 1, are no longer rounded to zero."""
    net = chain(quant(*BOTH, "--fm_bit", "3", "--wt_bit", "3", keywords=keywords)).eval()
    x = images() * 0.05
    activation = net[0].quant_activation

    def error() -> float:
        with torch.no_grad():
            return float((activation(x) - x).square().mean() / x.square().mean())

    assert error() > 0.5
    initialise_ranges(net, x)
    assert error() < 0.05


@pytest.mark.parametrize("keywords", ["dorefa,lsq", "pact", "lq"])
def test_images_of_zeros_leave_finite_values(keywords: str) -> None:
    net = chain(quant(*BOTH, "--fm_bit", "2", "--wt_bit", "2", keywords=keywords))
    initialise_ranges(net, torch.zeros(2, 3, 8, 8))
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert net(images()).isfinite().all()


def test_a_batch_that_fails_leaves_the_network_alone() -> None:
    net = chain(quant(*BOTH)).train()
    with pytest.raises(RuntimeError):
        initialise_ranges(net, torch.zeros(1, 4, 8, 8))
    assert all(module.training and not module._forward_pre_hooks for module in net.modules())


def test_ranges_fit_training_even_where_running_statistics_do_not() -> None:
    """Weights normalised to unit deviation are tens of times larger than the ones the statistics belong to.

    Ranges found behind the old running statistics grew from layer to layer until, in training, every
    activation was zero and the gradients of the norms were not finite.
    """
    network = "--model resnet20 --width_alpha 0.125 --input_size 16 --dataset fake"
    quantizers_of = "--fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --wt_adaptive var-mean"
    quantized = f"{network} --keyword cifar10,origin,cbsa,fix,dorefa,lsq {quantizers_of}"
    torch.manual_seed(0)
    model = build_network(read(quantized.split()).model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(0.05)
    initialise_ranges(model, torch.randn(16, 3, 16, 16))
    ranges = [
        float(q.clip_val.detach().max()) for name, q in quantizers(model) if name.endswith("activation")
    ]
    assert max(ranges) < 20
    model.train()
    functional.cross_entropy(model(torch.randn(16, 3, 16, 16)), torch.arange(16) % 10).backward()
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    assert all(torch.tensor(norms).isfinite())
    assert all(float(p.grad.norm()) > 0 for n, p in model.named_parameters() if n.endswith("conv1.0.weight"))


@pytest.mark.parametrize("keywords", ["dorefa,lsq", "lq", "dorefa,non-uniform"])
def test_a_group_of_zeros_keeps_its_range(keywords: str) -> None:
    """A pruned channel or a dead activation says nothing; zero would be a range that levels cannot have."""
    levels = ("--fm_bit", "2", "--wt_bit", "2", *(("--wt_level", "3") if "uniform" in keywords else ()))
    net = chain(quant(*BOTH, *levels, keywords=keywords))
    with torch.no_grad():
        net[0].weight[1] = 0
    dead = dict(quantizers(net))["0.quant_weight"]
    before = dead.current_range().clone()
    initialise_ranges(net, images())
    after = dead.current_range()
    torch.testing.assert_close(after[1], before[1])
    assert (after[[0, 2, 3]] != before[[0, 2, 3]]).all()
    assert all(value.isfinite().all() for value in net(images()))


# Searches for the range ---------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", ["dorefa,lsq", "pact", "dorefa"])
@pytest.mark.parametrize("bits", ["2", "4"])
def test_least_squared_error(keywords: str, bits: str) -> None:
    """No other of the 100 fractions of the maximum has a smaller error, per group."""
    net = chain(quant(*BOTH, "--fm_bit", bits, "--wt_bit", bits, "--re_init", "--re_init_range", "mse",
                      keywords=keywords))  # fmt: skip
    config = quant("--re_init", "--re_init_range", "mse", *BOTH, keywords=keywords)
    initialise_ranges(net, images(), config)
    steps = 2 ** int(bits) - 1
    x = images().double().numpy()
    found = float(net[0].quant_activation.current_range())
    wanted = best_clip(x.reshape(1, -1), lambda r: np.round(np.clip(r, 0, 1) * steps) / steps)
    assert found == pytest.approx(wanted[0], rel=1e-5)
    if keywords == "dorefa,lsq":
        rows = net[0].weight.detach().double().numpy().reshape(4, -1)
        levels = best_clip(rows, lambda r: 2 * np.round(steps * (np.clip(r, -1, 1) + 1) / 2) / steps - 1)
        np.testing.assert_allclose(clip(net[0], "quant_weight").flatten(), levels, rtol=1e-5)


def best_clip(rows: np.ndarray, levels: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Of the fractions of each row's largest magnitude the one with the least squared error."""
    candidates = np.abs(rows).max(axis=1, keepdims=True) * np.arange(1, 101) / 100
    errors = [((levels(rows / c[:, None]) * c[:, None] - rows) ** 2).sum(axis=1) for c in candidates.T]
    return candidates[np.arange(len(rows)), np.argmin(errors, axis=0)]


@pytest.mark.parametrize("percent", ["50", "90", "100"])
def test_percentile(percent: str) -> None:
    """The smallest value that this percentage of |x| does not exceed; 100 is the maximum."""
    config = quant(*BOTH, "--re_init", "--re_init_range", "percentile", "--re_init_percentile", percent)
    net = chain(config)
    initialise_ranges(net, images(), config)
    rows = np.sort(np.abs(net[0].weight.detach().double().numpy().reshape(4, -1)), axis=1)
    wanted = rows[:, int(np.ceil(float(percent) / 100 * rows.shape[1])) - 1]
    np.testing.assert_allclose(clip(net[0], "quant_weight").flatten(), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("percent", "count", "rank"), [(99.9, 1000, 999), (99.9, 5000, 4995), (50, 3, 2), (0.001, 10, 1)]
)
def test_percentile_is_exact(percent: float, count: int, rank: int) -> None:
    """No rounding goes up by one."""
    rows = torch.arange(1.0, count + 1).flip(0).neg().reshape(1, -1)
    assert percentile_clip(rows, percent).tolist() == [rank]


@pytest.mark.parametrize("how", ["mse", "percentile"])
def test_searches_leave_groups_of_zeros_alone(how: str) -> None:
    config = quant(*BOTH, "--re_init", "--re_init_range", how, "--wt_boundary", "0.7")
    net = chain(config)
    with torch.no_grad():
        net[0].weight[1].zero_()
    initialise_ranges(net, images(), config)
    found = clip(net[0], "quant_weight").flatten()
    assert found[1] == pytest.approx(0.7) and (found > 0).all()


def test_searches_matter() -> None:
    """A percentile leaves an outlier out; the least squared error of everything weighs it."""
    errors = {}
    for how in ("paper", "mse", "percentile"):
        options = ("--re_init_percentile", "98") if how == "percentile" else ()
        config = quant(*BOTH, "--fm_bit", "4", "--re_init", "--re_init_range", how, *options)
        net, x = chain(config), images()
        x[0, 0, 0, 0] = 100.0
        initialise_ranges(net, x, config)
        q = net[0].quant_activation(x).detach()
        errors[how] = float((q - x)[x <= 1].square().mean())
    assert errors["percentile"] < errors["paper"] and errors["mse"] > errors["percentile"]
