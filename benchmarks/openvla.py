"""OpenVLA's act and update against the straightforward way, and ROAD's update against PPO's.

The straightforward way is what a port of the original code to today's ``transformers`` does: HF
``generate`` with logits over the whole vocabulary, micro-batches of 8, the towers' unused last
blocks computed, one ``.item()`` per metric and micro-batch, adapters as peft
computes them. OpenVLA's own class asks for the logits of every position; ``generate`` alone asks
for those of the last, which is timed too. Both run on the same weights, in one
process and in turn, so that a machine whose speed drifts does not bias the ratios.

    python benchmarks/openvla.py [--size tiny|medium|7b] [--device cpu|cuda] [--threads N]
        [--observations B] [--transitions N] [--minibatch M] [--repeats R] [--output FILE]

It also measures the machine's matmul rate (bfloat16 on a GPU, float32 on a CPU), and prints what
share of it prefill and update reach, the GPU's peak memory, and the hours that 850,000 environment
steps would take at these speeds, the simulator not counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from roadvla.evaluation.machine import describe_machine
from roadvla.objective import ppo_loss, token_log_probs, value_loss
from roadvla.policy.action_tokens import LAST_TOKEN_ID, NUM_BINS, TABLETOP_STATS, token_ids
from roadvla.policy.openvla.adapted import OpenVLAPolicy
from roadvla.policy.openvla.adapters import FusedLinear
from roadvla.policy.openvla.architecture import Architecture, Tower
from roadvla.policy.openvla.cost import prefill_flops, update_flops
from roadvla.policy.openvla.model import OpenVLA
from roadvla.policy.openvla.preprocess import default_preprocessing
from roadvla.policy.openvla.vision import Block
from roadvla.policy.settings import OpenVLASettings
from roadvla.train.config import Algorithm, Optimizer
from roadvla.train.update import losses, make_optimizer, select
from roadvla.types import Batch, Observation

FIRST = LAST_TOKEN_ID + 1 - NUM_BINS
PROMPT = 24
MICRO = 8


@dataclass(frozen=True)
class Size:
    """A model's widths and depths, and how much work is timed on it by default."""

    vision: tuple[tuple[int, int, int, int], ...]  # width, depth that is run, heads, mlp
    hidden: int
    intermediate: int
    layers: int
    heads: int
    rank: int
    observations: int
    transitions: int
    minibatch: int


SIZES = {
    "tiny": Size(((48, 2, 4, 192), (40, 3, 2, 149)), 64, 176, 2, 4, 4, 16, 16, 16),
    "medium": Size(((256, 5, 4, 1024), (288, 6, 4, 1076)), 768, 2064, 6, 12, 32, 32, 16, 16),
    "7b": Size(((1024, 23, 16, 4096), (1152, 26, 16, 4304)), 4096, 11008, 32, 32, 32, 64, 160, 20),
}


class OnlyActions(LogitsProcessor):
    """Sets every logit outside the action tokens to minus infinity, as RL4VLA does."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask the scores of the next token."""
        masked = torch.full_like(scores, -torch.inf)
        masked[:, FIRST : LAST_TOKEN_ID + 1] = scores[:, FIRST : LAST_TOKEN_ID + 1]
        return masked


class Straightforward(nn.Module):
    """The original's flow on the same modules, with the last vision blocks that nobody reads."""

    def __init__(self, policy: OpenVLAPolicy) -> None:
        super().__init__()
        self.model = policy.model
        self.dead = [
            Block(tower).to(self.model.device, self.model.dtype)
            for tower in self.model.architecture.towers
        ]

    def embed(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Image and text as the decoder's input."""
        features = []
        towers = self.model.vision_backbone.children()
        for tower, dead, part in zip(towers, self.dead, pixels.split(3, dim=1), strict=True):
            patches = tower(part.to(self.model.dtype))
            dead(patches)
            features.append(patches)
        patches = self.model.projector(torch.cat(features, dim=-1))
        text = self.model.language_model.model.embed_tokens(ids)
        return torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)

    @torch.no_grad()
    def act(
        self, pixels: Tensor, ids: Tensor, *, every_position: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities and values of one action per row."""
        llama = self.model.language_model
        if every_position:
            plain = type(llama).forward
            forward = functools.partial(plain, llama)
            llama.forward = lambda **inputs: forward(**{**inputs, "logits_to_keep": 0})  # type: ignore[method-assign]
        try:
            parts = [
                self._act(part, words)
                for part, words in zip(pixels.split(MICRO), ids.split(MICRO), strict=True)
            ]
        finally:
            vars(llama).pop("forward", None)
        tokens, log_probs, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return tokens, log_probs, values

    def _act(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(pixels, ids)
        out = self.model.language_model.generate(
            inputs_embeds=x,
            attention_mask=torch.ones(x.shape[:2], dtype=torch.int64, device=x.device),
            generation_config=GenerationConfig(
                max_new_tokens=7, do_sample=True, top_k=0, pad_token_id=32000, eos_token_id=None
            ),
            logits_processor=LogitsProcessorList([OnlyActions()]),
            return_dict_in_generate=True,
            output_logits=True,
            output_hidden_states=True,
        )
        logits = torch.stack(out.logits, dim=1)[..., FIRST : LAST_TOKEN_ID + 1].float()
        chosen = (out.sequences - FIRST).unsqueeze(-1)
        log_probs = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
        return out.sequences, log_probs, self.model.value_head(out.hidden_states[0][-1][:, -1])

    def update(self, batch: Batch, pixels: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
        """One optimiser step over the batch."""
        metrics: dict[str, list[float]] = {"loss": [], "value": [], "clip": []}
        count = len(batch.action_tokens)
        for start in range(0, count, MICRO):
            part = select(batch, torch.arange(start, start + MICRO, device=pixels.device))
            ids = torch.cat([part.observation.prompt, token_ids(part.action_tokens)], dim=1)
            x = self.embed(pixels[start : start + MICRO], ids)
            out = self.model.language_model(inputs_embeds=x, output_hidden_states=True)
            logits = out.logits.float()[:, -8:-1, FIRST : LAST_TOKEN_ID + 1].flip(-1)
            value = self.model.value_head(out.hidden_states[-1][:, -8])
            log_probs = token_log_probs(logits, part.action_tokens)
            policy, clipped = ppo_loss(log_probs, part.old_log_probs, part.advantage)
            worth = value_loss(value, part.old_value, part.returns)
            ((policy + worth) * MICRO / count).backward()
            for name, number in (("loss", policy), ("value", worth), ("clip", clipped)):
                metrics[name].append(number.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--observations", type=int)
    parser.add_argument("--transitions", type=int)
    parser.add_argument("--minibatch", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    size = replace(
        size,
        observations=arguments.observations or size.observations,
        transitions=arguments.transitions or size.transitions,
        minibatch=arguments.minibatch or size.minibatch,
    )
    policy = build(size, arguments.device, compiled=arguments.compile)
    result = {
        "machine": describe_machine(arguments.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "size": arguments.size,
        **asdict(size),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "compiled": arguments.compile,
        **measure(policy, size, arguments.repeats),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def build(size: Size, device: str, *, compiled: bool) -> OpenVLAPolicy:
    """A policy with random weights and adapters that are not zero."""
    towers = tuple(
        Tower(
            width=width,
            depth=depth,
            heads=heads,
            mlp=mlp,
            patch=14,
            patches=256,
            registers=0 if index else 4,
            class_token=not index,
            layer_scale=not index,
            packed=True,
        )
        for index, (width, depth, heads, mlp) in enumerate(size.vision)
    )
    text = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "vocab_size": 32064,
        "pad_token_id": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    }
    stats = {"tabletop": TABLETOP_STATS.to_dict()}
    architecture = Architecture(
        towers=towers, image_size=224, text=text, prompt_style="openvla", norm_stats=stats
    )
    cuda = device.startswith("cuda")
    with torch.device("meta"):
        model = OpenVLA(architecture)
    model = model.to(torch.bfloat16 if cuda else torch.float32).to_empty(device=device)
    model.value_head.float()
    model.reset_rotation(device)
    for name, parameter in model.named_parameters():
        norm = name.endswith(("norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight"))
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        nn.init.ones_(parameter) if norm else nn.init.normal_(parameter, std=min(0.02, fan**-0.5))
    model._processing = default_preprocessing(len(towers), 224)
    model.requires_grad_(False)
    model.value_head.requires_grad_(True)
    settings = OpenVLASettings(
        dtype="bfloat16" if cuda else "float32", lora_rank=size.rank, compile=compiled
    )
    policy = OpenVLAPolicy(model.eval(), settings)
    for parameter in policy.policy_parameters():
        nn.init.normal_(parameter, std=0.01)
    return policy


def measure(policy: OpenVLAPolicy, size: Size, repeats: int) -> dict[str, object]:
    plain, device = Straightforward(policy), policy.model.device
    batch = make_batch(policy, size.transitions, device)
    act = make_batch(policy, size.observations, device).observation
    pixels = policy.model.preprocess(act.image, method="tensor")
    update_pixels = policy.model.preprocess(batch.observation.image, method="tensor")
    lengths = torch.full((size.observations,), PROMPT, device=device)
    uniform = torch.rand(size.observations, 7, device=device)
    rates = Optimizer(minibatch=size.minibatch)
    ours = make_optimizer(policy, rates)
    theirs: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(list(policy.policy_parameters()), lr=1e-4),
        torch.optim.AdamW(list(policy.value_parameters()), lr=3e-3),
    ]
    algorithms = {
        "ppo": Algorithm(algo="ppo"),
        "road": Algorithm(algo="road", alpha=0.0),
    }
    ways: dict[str, Callable[[], object]] = {
        "act straightforward": as_peft(lambda: plain.act(pixels, act.prompt, every_position=True)),
        "act generate": as_peft(lambda: plain.act(pixels, act.prompt, every_position=False)),
        "prefill": lambda: prefill(policy.model, pixels, act.prompt, lengths),
        "act": lambda: policy.model.act_on(pixels, act.prompt, lengths, uniform, temperature=1.0),
        "update straightforward": as_peft(lambda: plain.update(batch, update_pixels, theirs)),
        "update ppo": lambda: train_step(policy, ours, batch, algorithms["ppo"], rates),
        "update road": lambda: train_step(policy, ours, batch, algorithms["road"], rates),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            took = seconds(way, device)
            if repeat:  # the first round warms up
                times[name].append(took)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        "act: straightforward / ours": pairs(times, "act straightforward", "act"),
        "act: generate / ours": pairs(times, "act generate", "act"),
        "update: straightforward / ours": pairs(times, "update straightforward", "update ppo"),
        "update: road / ppo": pairs(times, "update road", "update ppo"),
    }
    return {"seconds": median, "ratios": ratios, **rates_of(policy, size, median)}


@torch.no_grad()
def prefill(model: OpenVLA, pixels: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Image and prompt to a value: how acting starts, and all that a reference critic does."""
    return model.value_on(pixels, ids, lengths)


def rates_of(policy: OpenVLAPolicy, size: Size, median: dict[str, float]) -> dict[str, object]:
    """Shares of the matmul rate, memory, and the time of 850,000 environment steps."""
    model = policy.model
    peak = matmul_rate(model.device, model.dtype)
    a, rank = model.architecture, size.rank
    once = prefill_flops(a, PROMPT, rank).forward * size.observations / median["prefill"]
    learnt = update_flops(a, PROMPT, rank) * size.transitions / median["update ppo"]
    steps = 850_000
    acting = median["act"] / size.observations
    judging = median["prefill"] / size.observations
    ppo, road = (median[f"update {name}"] / size.transitions for name in ("ppo", "road"))
    cuda = model.device.type == "cuda"
    return {
        "matmul_tflops": peak / 1e12,
        "prefill_share_of_matmul": once / peak,
        "update_share_of_matmul": learnt / peak,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "hours_of_850k_steps": {
            "ppo": steps * (acting + ppo) / 3600,
            "road": steps * (acting + judging + road) / 3600,
        },
    }


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square product, the best of several."""
    width = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    taken = [seconds(lambda: a @ b, device) for _ in range(8)]
    return 2 * width**3 / min(taken)


def as_peft(way: Callable[[], object]) -> Callable[[], object]:
    """Run with the adapters' forward pass that peft ships."""

    def run() -> object:
        ours = FusedLinear.forward
        FusedLinear.forward = LoraLinear.forward  # type: ignore[method-assign]
        try:
            return way()
        finally:
            FusedLinear.forward = ours  # type: ignore[method-assign]

    return run


def pairs(times: dict[str, list[float]], above: str, below: str) -> dict[str, float]:
    found = [a / b for a, b in zip(times[above], times[below], strict=True)]
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def train_step(
    policy: OpenVLAPolicy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    algorithm: Algorithm,
    rates: Optimizer,
) -> None:
    """One optimiser step over the batch, as ``roadvla.train.update`` makes it."""
    optimizer.zero_grad(set_to_none=True)
    order = torch.randperm(len(batch.action_tokens), device=batch.action_tokens.device)
    for index in order.split(rates.minibatch):
        total, _ = losses(
            policy, select(batch, index), algorithm, temperature=1.0, value_only=False
        )
        (total * (len(index) / len(order))).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, rates.grad_clip)
    optimizer.step()


def make_batch(policy: OpenVLAPolicy, count: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=generator)
    prompt = torch.randint(300, 30000, (count, PROMPT), generator=generator)
    numbers = torch.randn(count, generator=generator).to(device)
    return Batch(
        observation=Observation(image=image.to(device), prompt=prompt.to(device)),
        action_tokens=torch.randint(0, 256, (count, 7), generator=generator).to(device),
        old_log_probs=torch.full((count, 7), -5.5, device=device),
        old_value=torch.zeros(count, device=device),
        advantage=numbers,
        returns=numbers,
        weight=numbers.clamp(-2, 2),
    )


def seconds(way: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
