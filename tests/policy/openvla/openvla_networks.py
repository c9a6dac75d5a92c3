"""Networks with adapters, small but with every kind of layer, on random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from roadvla.policy.openvla.adapters import adapted_modules, attach
from roadvla.policy.openvla.architecture import Architecture, Tower
from roadvla.policy.openvla.network import Network

DINO = Tower(
    width=96,
    depth=3,
    heads=4,
    mlp=384,
    patch=14,
    patches=256,
    registers=4,
    class_token=True,
    layer_scale=True,
    packed=True,
)
SIGLIP = Tower(
    width=128,
    depth=3,
    heads=4,
    mlp=424,
    patch=14,
    patches=256,
    registers=0,
    class_token=False,
    layer_scale=False,
    packed=True,
)


def make_architecture(
    towers: tuple[Tower, ...] = (DINO, SIGLIP),
    *,
    hidden: int = 128,
    inner: int = 344,
    layers: int = 3,
    shared: int = 4,
) -> Architecture:
    """Sizes with a decoder of four heads."""
    text = {
        "vocab_size": 32064,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": shared,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "pad_token_id": 32000,
    }
    return Architecture(
        towers=towers, image_size=224, text=text, prompt_style="openvla", norm_stats={}
    )


def make_network(
    architecture: Architecture,
    *,
    rank: int,
    lm_head: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A frozen base of the dtype, with float32 adapters and value head."""
    network = Network(architecture).requires_grad_(False).to(dtype)
    network.value_head.float().requires_grad_(True)
    network.reset_rotation("cpu")
    modules = adapted_modules(network, lm_head=lm_head)
    attach(network, "policy", modules, rank=rank, alpha=2 * rank)
    return network.eval()


def random_inputs(
    count: int, prompt: int, *, towers: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pixels, prompt ids, their lengths, action tokens, and a uniform number for each."""
    return (
        torch.randn(count, 3 * towers, 224, 224),
        torch.randint(3, 300, (count, prompt)),
        torch.full((count,), prompt),
        torch.randint(0, 256, (count, 7)),
        torch.rand(count, 7),
    )
