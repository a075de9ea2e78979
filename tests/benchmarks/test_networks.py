"""The drawings of the ResNet's parts against the networks that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.networks import PICTURES, Panel, boxes, draw, main, network, places, share
from model.layers.space_to_depth import PadToBlocks, RepeatChannels

PANELS = {
    f"{picture}: {panel.title}": panel for picture, rows in PICTURES.items() for row in rows for panel in row
}

LAYERS = (
    nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d,
    PadToBlocks, RepeatChannels,
)  # fmt: skip


def executed(panel: Panel) -> list[str]:
    """The names of the layers of a panel's part as a real image runs through them."""
    model = network(panel).eval()
    names: list[str] = []
    for name, module in model.get_submodule(panel.part).named_modules(prefix=panel.part):
        if isinstance(module, LAYERS):
            module.register_forward_hook(lambda *_, name=name: names.append(name))
    model(torch.zeros(1, 3, 32, 32))
    return names


@pytest.mark.parametrize("name", PANELS)
def test_a_drawing_shows_the_layers_in_the_order_they_run(name: str) -> None:
    panel = PANELS[name]
    model = network(panel)
    layers = dict(model.named_modules())
    drawn = [
        box.name
        for box in boxes(panel, model)
        if box.name and box.name in layers and not box.text.endswith("blocks")
    ]
    ran = [layer for layer in executed(panel) if panel.part or not layer.startswith("layer")]
    assert drawn == ran


@pytest.mark.parametrize("name", PANELS)
def test_a_drawing_names_every_parameter_and_overlaps_nowhere(name: str) -> None:
    panel = PANELS[name]
    model = network(panel)
    steps = boxes(panel, model)
    named = {parameter for box in steps for parameter in box.parameters}
    assert named == {key for key, _ in model.named_parameters() if key.startswith(panel.part)}
    assert named <= model.state_dict().keys()
    assert all(source < place for place, box in enumerate(steps) for source in box.inputs)
    where = places(steps)
    assert len(set(where)) == len(where)


def test_a_shortcut_and_a_sum_are_drawn() -> None:
    panel = PANELS["orders-origin: cbsa,origin,fix, layer2.0"]
    steps = boxes(panel, network(panel))
    total = next(box for box in steps if box.text == "+")
    assert {steps[place].name for place in total.inputs} == {"layer2.0.bn2.0", "layer2.0.skip.2"}
    assert steps[-1].name == "layer2.0.fix_relu"
    assert [steps[place].text for place in steps[-1].inputs] == ["+"]


def test_a_picture_is_written(tmp_path: Path) -> None:
    assert draw("skips", tmp_path / "new").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_picture_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["order"])
    assert stopped.value.code == 2
    assert "order is no picture; choose from orders, orders-origin" in capsys.readouterr().err


def test_the_share_that_is_quantized_is_that_of_all_kernels_but_the_ends() -> None:
    network = torchvision.models.squeezenet1_1(num_classes=1000).eval()
    kernels: list[int] = []
    macs: list[int] = []  # an output of a layer takes a product for each weight of its channel

    def count(layer: nn.Conv2d, _: object, output: Tensor) -> None:
        kernels.append(layer.weight.numel())
        macs.append(output.numel() * layer.weight[0].numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    products, weights = (100 * sum(each[1:-1]) / sum(each) for each in (macs, kernels))
    row = f"| `torchvision:squeezenet1_1` | {products:.1f} | {weights:.1f} | Conv2d {100 - products:.1f} |"
    assert share("torchvision:squeezenet1_1") == row


def test_a_network_that_computes_while_it_is_built_has_a_share() -> None:
    """A regnet, whose widths come from tensors' numbers, which the meta device does not have."""
    _, name, products, weights, left, _ = share("torchvision:regnet_y_400mf").split("|")
    assert name.strip() == "`torchvision:regnet_y_400mf`"
    assert 90 < float(products) < 100 and 80 < float(weights) < 100 and left.split()[0] == "Conv2d"
