"""The frozen base spread over the processes of a run (FSDP2), where it does not fit one GPU.

Every block of the vision towers, the projector and every decoder layer keeps one part of its
weights per process; the whole block is put together just before it is used and dropped after.
Adapters and value head are small and trained, so every process has all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from roadvla.policy.openvla.adapted import OpenVLAPolicy, ReferenceCritic
from roadvla.policy.openvla.vision import Block


class _Layer(nn.Module):
    """A decoder layer behind a call, which is where its weights come and go.

    The passes over the decoder are functions of a layer (``decoder.py``); here they are handed in.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do the work on the layer."""
        return work(self.layer, *arguments)


def spread(
    policy: OpenVLAPolicy, critic: ReferenceCritic | None, device: torch.device, processes: int
) -> None:
    """Keep a part of the base in each process, on its device; changes the policy in place.

    From then on every process must make the same passes in the same order.

    Args:
        policy: On the CPU, or on the device already; its critic's adapter attached.
        critic: On the same base.
        device: Where this process computes.
        processes: All of the run.
    """
    mesh = init_device_mesh(device.type, (processes,))
    model = policy.model
    kept = {p for name, p in model.named_parameters() if ".lora_" in name}
    for module in model.modules():
        if isinstance(module, Block):
            _shard(module, mesh, kept)
    _shard(model.projector, mesh, kept)
    layers: dict[nn.Module, nn.Module] = {}
    for layer in model.language_model.model.layers:
        layers[layer] = _shard(_Layer(cast("nn.Module", layer)), mesh, kept)
    model.run_layers_by(lambda work, layer, *arguments: layers[layer](work, *arguments))
    policy.to(device)
    if critic is not None:
        critic.to(device)


def _shard(module: nn.Module, mesh: Any, kept: set[nn.Parameter]) -> nn.Module:
    return cast(
        "nn.Module", fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    )
