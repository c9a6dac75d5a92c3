"""LoRA on OpenVLA, through ``peft``: which layers, attaching, switching, weights in and out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from roadvla.errors import UserError
from roadvla.policy.openvla.architecture import is_dead
from roadvla.policy.openvla.network import Network

SUFFIXES = (
    *("qkv", "proj", "fc1", "fc2", "fc3", "q", "kv"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
"""Last parts of the names of adapted layers, RL4VLA's list; ``lm_head`` comes on top if wanted."""

LM_HEAD = "language_model.lm_head"


class FusedLinear(LoraLinear):
    """``peft``'s layer, with scale and sum inside the second product: W x + b + (α/r) B (A x).

    peft's own forward pass writes the adapter's full-width output twice more, and multiplies in the
    adapter's precision. Here everything runs in the input's; A and B stay float32 where they are
    kept and updated.

    Without gradient, float32 and many rows, W + (α/r) B A is formed first: that is less work than
    two products per row. Not in bfloat16, whose rounding of the sum would lose small adapters.
    """

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:  # type: ignore[override]
        """Apply base and active adapter."""
        (name,) = self.active_adapters
        base = cast("nn.Linear", self.base_layer)
        (a, b), scale = lora_weights(self, name), self.scaling[name]
        flat = x.flatten(0, -2)
        if _folding_pays(flat, base):
            return F.linear(x, torch.addmm(base.weight, b, a, alpha=scale), base.bias)
        low = F.linear(flat, a.to(x.dtype))
        out = torch.addmm(base(flat), low, b.to(x.dtype).t(), alpha=scale)
        return out.unflatten(0, x.shape[:-1])


def lora_weights(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """Return the weights of A and B of one adapter of a layer."""
    a, b = cast("nn.Linear", layer.lora_A[name]), cast("nn.Linear", layer.lora_B[name])
    return a.weight, b.weight


def _folding_pays(flat: Float[Tensor, "M I"], base: nn.Linear) -> bool:
    """Whether M rows through A and B (r (I + O) each) are more work than B A (r I O)."""
    outputs, inputs = base.weight.shape
    exact = flat.dtype == torch.float32 and not torch.is_grad_enabled()
    return exact and len(flat) * (inputs + outputs) > inputs * outputs


def adapted_modules(network: Network, *, lm_head: bool) -> list[str]:
    """Name the layers that get an adapter: all linear ones and the patch embeddings.

    Dead modules (the towers' last blocks, SigLIP's pooling) are not built, so they get none.

    Args:
        network: Without adapters yet.
        lm_head: Whether the output layer is among them.
    """
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not name.startswith("value_head.")
        and (name.rpartition(".")[2] in SUFFIXES or (lm_head and name == LM_HEAD))
    ]


def attach(network: Network, name: str, modules: Sequence[str], *, rank: int, alpha: int) -> None:
    """Put a fresh adapter on layers and make it the active one; only it is trainable then.

    A is drawn from N(0, 1/r²) by a generator of its own, B is 0 (RL4VLA's "gaussian"). Both are
    float32 whatever the base is.

    Args:
        network: Changed in place.
        name: Of the adapter.
        modules: Layers, as ``adapted_modules`` names them.
        rank: r.
        alpha: α; the adapter's output is scaled by α/r.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(modules),
        init_lora_weights=False,
    )
    config._register_custom_module({nn.Linear: FusedLinear})
    trained = {name for name, p in network.value_head.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        # A second adapter, the reference critic's, is meant to be there beside the first.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, adapter_name=name)
    for head_name, parameter in network.value_head.named_parameters():
        parameter.requires_grad_(head_name in trained)  # injecting froze it
    generator = torch.Generator().manual_seed(0)
    for _, layer in _layers(network):
        for part in (layer.lora_A[name], layer.lora_B[name]):
            part.to(torch.float32)
        a, b = lora_weights(layer, name)
        with torch.no_grad():
            if not a.is_meta:
                a.copy_(torch.randn(a.shape, generator=generator) / rank)
            b.zero_()


def adapter_weights(network: Network, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Copy an adapter's A and B per layer to the CPU."""
    weights = {module: lora_weights(layer, name) for module, layer in _layers(network)}
    return {
        module: (a.detach().cpu().clone(), b.detach().cpu().clone())
        for module, (a, b) in weights.items()
    }


def load_adapter(
    network: Network, name: str, weights: Mapping[str, tuple[Tensor, Tensor]], source: str
) -> None:
    """Copy stored weights into an attached adapter; those of dead modules are left out.

    Args:
        network: With the adapter attached.
        name: Of the adapter.
        weights: A and B per layer.
        source: Named in errors.

    Raises:
        UserError: If layers are missing or unknown, or a shape is another.
    """
    alive = {
        module: pair
        for module, pair in weights.items()
        if not is_dead(f"{module}.weight", network.architecture)
    }
    layers = dict(_layers(network))
    missing, unknown = sorted(layers.keys() - alive.keys()), sorted(alive.keys() - layers.keys())
    if missing == [LM_HEAD] or unknown == [LM_HEAD]:
        has, flag = ("no", "--no-lora-lm-head") if missing else ("an", "--lora-lm-head")
        raise UserError(f"adapter {source} has {has} adapter on {LM_HEAD}: pass {flag}")
    if missing or unknown:
        raise UserError(
            f"adapter {source} does not cover the layers of this checkpoint: "
            f"{len(missing)} missing{_first(missing)}, {len(unknown)} unknown{_first(unknown)}; "
            f"use the checkpoint it was trained on"
        )
    with torch.no_grad():
        for module, layer in layers.items():
            for weight, stored in zip(lora_weights(layer, name), alive[module], strict=True):
                if weight.shape != stored.shape:
                    raise UserError(
                        f"adapter {source} does not fit at {module}: {tuple(stored.shape)}, "
                        f"expected {tuple(weight.shape)}; use the checkpoint it was trained on"
                    )
                weight.copy_(stored)


@contextmanager
def switched(network: Network, name: str, back: str) -> Iterator[None]:
    """Let another adapter act, without gradient, and put the trained one back afterwards."""
    layers = [layer for _, layer in _layers(network)]
    try:
        for layer in layers:
            layer.set_adapter(name, inference_mode=True)
        yield
    finally:
        for layer in layers:
            layer.set_adapter(back)


def _layers(network: Network) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, m) for name, m in network.named_modules() if isinstance(m, LoraLayer))


def _first(names: Sequence[str]) -> str:
    return f" ({names[0]}, …)" if names else ""
