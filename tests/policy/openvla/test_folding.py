"""Adapters folded into the base where that is exact and less work, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from openvla_networks import make_architecture, make_network, random_inputs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from roadvla.policy.openvla.adapters import FusedLinear, attach
from roadvla.policy.openvla.network import Network

INPUTS, OUTPUTS, RANK = 24, 40, 4
EVEN = INPUTS * OUTPUTS // (INPUTS + OUTPUTS)  # 15: as many rows cost the same either way


class _OneLayer(Network):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.fc1, self.value_head = nn.Linear(INPUTS, OUTPUTS), nn.Linear(1, 1)


def _layer(dtype: torch.dtype = torch.float32) -> FusedLinear:
    network = _OneLayer().to(dtype)
    attach(network, "policy", ["fc1"], rank=RANK, alpha=8)
    layer = network.fc1
    assert isinstance(layer, FusedLinear)
    nn.init.normal_(layer.lora_B["policy"].weight)
    return layer


def _by_hand(layer: FusedLinear, x: Tensor) -> Tensor:
    a, b = layer.lora_A["policy"].weight.double(), layer.lora_B["policy"].weight.double()
    base = layer.base_layer
    plain = x.double() @ base.weight.double().T + base.bias.double()
    return plain + 8 / RANK * (x.double() @ a.T @ b.T)


def _flops(layer: FusedLinear, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("rows", [1, EVEN, EVEN + 1, 200])
def test_the_same_output_either_way(rows: int) -> None:
    layer, x = _layer(), torch.randn(rows, INPUTS)
    expected = _by_hand(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(layer(x[None]), layer(x)[None])
    torch.testing.assert_close(layer(x).double(), expected, atol=2e-5, rtol=1e-5)


def test_the_way_that_is_less_work() -> None:
    layer = _layer()
    with torch.no_grad():
        for rows in (1, EVEN, EVEN + 1, 200):
            apart = 2 * rows * RANK * (INPUTS + OUTPUTS)
            folded = 2 * RANK * INPUTS * OUTPUTS
            expected = 2 * rows * INPUTS * OUTPUTS + min(apart, folded)
            assert _flops(layer, torch.randn(rows, INPUTS)) == expected


@pytest.mark.parametrize("grad", [True, False])
def test_apart_with_gradient_and_in_bfloat16(grad: bool) -> None:
    dtype = torch.float32 if grad else torch.bfloat16
    layer, rows = _layer(dtype), 200
    with torch.set_grad_enabled(grad):
        expected = 2 * rows * INPUTS * OUTPUTS + 2 * rows * RANK * (INPUTS + OUTPUTS)
        assert _flops(layer, torch.randn(rows, INPUTS, dtype=dtype)) == expected


def test_acting_follows_the_policy_that_is_updated() -> None:
    torch.manual_seed(0)
    network: Network = make_network(make_architecture(), rank=RANK)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    pixels, ids, lengths, _, uniform = random_inputs(3, 12)
    acted = network.act_on(pixels, ids, lengths, uniform, temperature=1.0)
    logits, value = network.evaluate_on(pixels, ids, lengths, acted.action_tokens)
    assert logits.requires_grad
    assert acted.logits is not None
    torch.testing.assert_close(acted.logits, logits.detach(), atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(acted.value, value.detach(), atol=3e-5, rtol=1e-4)
