"""MACs, bit operations and memory beside those that torch and qonnx count."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.calibrate import initialise_ranges
from model.deploy.graph import deploy_graph
from model.deploy.qonnx_quant import qonnx_model
from model.networks.build import build_network
from model.watch.cost import network_cost
from utils.config.layer_bits import FULL_BITS
from utils.config.resolve import read

LOW = "dorefa,lsq --fm_enable --wt_enable --wt_grid midtread"


@pytest.mark.slow
@pytest.mark.parametrize("line", [f"{LOW} --fm_bit 4 --wt_bit 3", "fix"])
def test_layers_cost_what_torch_and_qonnx_count(line: str) -> None:
    pytest.importorskip("qonnx")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.inference_cost import inference_cost

    words, *options = line.split()
    keywords = f"cifar10,origin,cbsa,{words}"
    argv = [
        "--model",
        "resnet20",
        "--width_alpha",
        "0.25",
        "--keyword",
        keywords,
        "--input_size",
        "16",
        *options,
    ]
    config = read(argv).model
    torch.manual_seed(0)
    network = build_network(config).eval()
    images = torch.randn(4, 3, 16, 16)
    initialise_ranges(
        network, images, config.quant
    )  # every code occurs: qonnx counts the bits that hold the codes
    cost = network_cost(network, 16)
    with FlopCounterMode(display=False) as flops:
        network(images[:1])
    assert flops.get_total_flops() == 2 * cost.macs

    model = ModelWrapper(qonnx_model(deploy_graph(network, (3, 16, 16))))
    found = inference_cost(model, discount_sparsity=False, cost_breakdown=True)
    nodes = [node for name, node in found["node_cost"].items() if node.get("total_macs")]
    # The graph's order of a shortcut and the convolutions beside it is another one.
    theirs = sorted(
        tuple(int(node[f"total_{key}"]) for key in ("macs", "bops", "mem_w_bits", "mem_o_elems"))
        for node in nodes
    )
    ours = sorted(
        (
            layer.macs,
            layer.bit_operations,
            layer.weights * layer.weight_bits,
            torch.Size(layer.output).numel(),
        )
        for layer in cost.layers
    )
    assert ours == theirs
    low = [layer for layer in cost.layers if layer.weight]
    assert bool(low) == (words != "fix") and {layer.weight_bits for layer in low} <= {3}
    assert sum(layer.macs for layer in cost.layers if layer.weight_bits == FULL_BITS) < cost.macs or not low
    assert cost.layers[0].inputs == 3 * 16 * 16 and cost.layers[0].input_bytes == 4 * 3 * 16 * 16
    assert cost.layers[-1].inputs == cost.layers[-1].weights // config.num_classes
