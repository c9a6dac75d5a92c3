"""How well a tiny VLA reads hints, and what they cost pretraining: `python benchmarks/hints.py`.

Held-out primitives are put to the policy without their hint, with it, and with the hint of the next
state instead; with frames, and with frames that show nothing. Reading a hint is worth the
difference between the first two, and trusting it costs the third.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from roadvla.policy import BACKBONE_FOLDER, TinyVLA, load_policy
from roadvla.train.pretrain import PretrainConfig, PretrainProgress, pretrain
from roadvla.train.primitives import CYCLE, HINTED, HINTS, Primitives, PrimitiveSampler
from roadvla.types import Observation

_HELD_OUT = 1 << 24  # index of the first batch: far beyond those of pretraining
_GRAY = 128


@dataclass(frozen=True)
class Reading:
    """How a policy does on one kind of prompt.

    Attributes:
        kind: Of hint.
        frames: ``seen``, or ``blank`` where they show nothing.
        hint: ``none``, ``true`` or ``wrong``.
        loss: Cross-entropy of the right action, nats per token.
        accuracy: Fraction of its tokens that are most likely, the right ones before them given.
        error: Mean distance of the greedy action's motions from it, in fractions of their limits.
        gripper: Fraction of greedy actions that open or close as they should.
    """

    kind: str
    frames: str
    hint: str
    loss: float
    accuracy: float
    error: float
    gripper: float


def hint_gain(policy: TinyVLA, *, batches: int = 16, batch: int = 128) -> list[Reading]:
    """Measure a policy on held-out primitives with and without every kind of hint.

    Args:
        policy: It is only asked, never changed.
        batches: Per kind; 16 meet every distribution once.
        batch: States in each.
    """
    sampler = PrimitiveSampler(batch, policy.device)
    readings = []
    for kind in HINTS:
        drawn = [sampler.hinted(_HELD_OUT + index, kind) for index in range(batches)]
        for frames in ("seen", "blank"):
            for hint in ("none", "true", "wrong"):
                scores = [
                    _score(policy, plain, _prompts(plain, hinted, hint), blank=frames == "blank")
                    for plain, hinted in drawn
                ]
                means = torch.stack(scores).mean(0).tolist()
                readings.append(Reading(kind, frames, hint, *means))
    return readings


def _prompts(plain: Primitives, hinted: Primitives, hint: str) -> list[str]:
    if hint == "none":
        return plain.prompts
    if hint == "true":
        return hinted.prompts
    pairs = list(zip(plain.prompts, hinted.prompts, strict=True))
    hints = [told.removeprefix(asked) for asked, told in pairs]
    return [asked + told for asked, told in zip(plain.prompts, hints[1:] + hints[:1], strict=True)]


@torch.no_grad()
def _score(
    policy: TinyVLA, batch: Primitives, prompts: Sequence[str], *, blank: bool
) -> torch.Tensor:
    image = torch.full_like(batch.image, _GRAY) if blank else batch.image
    observation = Observation(image, policy.tokenize(prompts), policy.vision(image))
    tokens = policy.encode(batch.action)
    logits, _ = policy.evaluate(observation, tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    accuracy = (logits.argmax(-1) == tokens).float().mean()
    action = policy.decode(policy.act(observation, temperature=0.0).action_tokens)
    right = policy.decode(tokens)
    limits = torch.tensor(policy.norm_stats.q99, device=right.device)[:6]
    error = ((action - right)[:, :6].abs() / limits).mean()
    gripper = ((action[:, 6] > 0.5) == (right[:, 6] > 0.5)).float().mean()
    return torch.stack([loss, accuracy, error, gripper])


def pretraining_steps(
    config: PretrainConfig,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Pretrain, and tell the seconds and the loss of every step, by kind of hint."""
    seconds: dict[str, list[float]] = {kind: [] for kind in ("none", *HINTS)}
    losses: dict[str, list[float]] = {kind: [] for kind in ("none", *HINTS)}
    since = time.perf_counter()

    def note(progress: PretrainProgress) -> None:
        nonlocal since
        now = time.perf_counter()
        kind = HINTED.get((progress.step - 1) % CYCLE, "none")
        seconds[kind].append(now - since)
        losses[kind].append(progress.token_loss)
        since = now

    pretrain(config, note, report_every=1)
    return seconds, losses


def main() -> None:
    """Print what reading is worth, then what it costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", type=Path, default=BACKBONE_FOLDER)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=78, help="of pretraining to time, 0 for none")
    parser.add_argument("--batch", type=int, default=128, help="of these steps")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    print(f"{platform.platform()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    policy = load_policy(chosen.policy, chosen.device)
    if not isinstance(policy, TinyVLA):
        parser.error(f"{chosen.policy} is no tiny VLA")
    print(
        f"{'hint':<12}{'frames':<8}{'told':<8}{'loss':>8}{'tokens':>9}{'motion':>9}{'gripper':>9}"
    )
    for r in hint_gain(policy, batches=chosen.batches):
        print(
            f"{r.kind:<12}{r.frames:<8}{r.hint:<8}"
            f"{r.loss:8.3f}{r.accuracy:9.1%}{r.error:9.3f}{r.gripper:9.1%}"
        )
    if chosen.steps:
        config = PretrainConfig(steps=chosen.steps, batch=chosen.batch, device=chosen.device)
        _print_steps(*pretraining_steps(config))


def _print_steps(seconds: dict[str, list[float]], losses: dict[str, list[float]]) -> None:
    """Print medians, and how much longer a cycle of steps takes than as many without hints."""
    medians = {kind: statistics.median(values) for kind, values in seconds.items() if values}
    for kind, median in medians.items():
        curve = losses[kind]
        third = max(1, len(curve) // 3)
        first, last = statistics.mean(curve[:third]), statistics.mean(curve[-third:])
        print(f"step, {kind:<12}{median * 1e3:8.1f} ms   loss, thirds {first:.3f} → {last:.3f}")
    if len(medians) == 1 + len(HINTS):
        cycle = sum(medians[HINTED.get(index, "none")] for index in range(CYCLE))
        print(f"pretraining is {cycle / (CYCLE * medians['none']):.2f} times as long")


if __name__ == "__main__":
    main()
