"""Algorithm 1 and Theorem 1 once more, as plain Python over floats: slow, obvious, independent.

Nothing here imports torch or the package. Lists are indexed as the paper indexes: ``[t][b]``,
``[n][k][u]``.
"""

from __future__ import annotations

import itertools
import math


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(math.fsum((x - centre) ** 2 for x in values) / len(values))


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    return [x / math.fsum(weights) for x in weights]


def kl(a: list[float], b: list[float]) -> float:
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def advantages(
    rewards: list[list[float]],
    values: list[list[float]],
    last_value: list[float],
    ends: list[list[bool]],
    gamma: float,
    lam: float,
) -> list[list[float]]:
    """GAE as the explicit sum of discounted errors, every end of an episode terminal."""
    steps, episodes = len(rewards), len(last_value)
    result = [[0.0] * episodes for _ in range(steps)]
    for b in range(episodes):
        for t in range(steps):
            factor = 1.0
            for s in range(t, steps):
                following = values[s + 1][b] if s + 1 < steps else last_value[b]
                error = rewards[s][b] - values[s][b] + (0.0 if ends[s][b] else gamma * following)
                result[t][b] += factor * error
                if ends[s][b]:
                    break
                factor *= gamma * lam
    return result


def guidance(
    advantage_int: list[float],
    advantage_ref: list[float],
    alpha: float,
    clip: float,
    eps: float,
) -> tuple[list[float], list[bool], list[float]]:
    """Lines 11-17 of Algorithm 1: weights, gates and mixed advantages."""
    scale = deviation(advantage_int) / (deviation(advantage_ref) + eps)
    mixed, gates = [], []
    for own, other in zip(advantage_int, advantage_ref, strict=True):
        calibrated = mean(advantage_int) + scale * (other - mean(advantage_ref))
        agree = sign(own) == sign(calibrated)
        gates.append(agree)
        mixed.append(own + alpha * (calibrated - own) if agree else own)
    weights = []
    for value in mixed:
        standard = (value - mean(mixed)) / (deviation(mixed) + eps)
        weights.append(max(-clip, min(clip, standard)))
    return weights, gates, mixed


def agd_loss(
    logits: list[list[list[float]]], tokens: list[list[int]], weights: list[float], eta: float
) -> float:
    """Lines 18-25 of Algorithm 1: the mean token divergence from the tilted teacher."""
    terms = []
    for n, weight in enumerate(weights):
        for k, token in enumerate(tokens[n]):
            student = logits[n][k]
            teacher = [z + (eta * weight if u == token else 0.0) for u, z in enumerate(student)]
            terms.append(kl(softmax(teacher), softmax(student)))
    return mean(terms)


def action_probability(tables: list[list[list[float]]], action: tuple[int, ...]) -> float:
    """Probability of a token sequence; ``tables[k][prefix]`` holds the k-th token's logits."""
    probability, prefix = 1.0, 0
    for k, token in enumerate(action):
        probability *= softmax(tables[k][prefix])[token]
        prefix = prefix * len(tables[k][prefix]) + token
    return probability


def performance(
    transition: list[list[list[float]]],
    reward: list[list[float]],
    initial: list[float],
    horizon: int,
    probs: list[list[list[float]]],
) -> float:
    """Mean reward per step, by walking through every trajectory there is."""
    states, actions = range(len(initial)), range(len(reward[0]))
    total = 0.0
    for path in itertools.product(itertools.product(states, actions), repeat=horizon):
        probability = initial[path[0][0]]
        for t, (state, action) in enumerate(path):
            probability *= probs[t][state][action]
            if t + 1 < horizon:
                probability *= transition[state][action][path[t + 1][0]]
        total += probability * math.fsum(reward[s][a] for s, a in path)
    return total / horizon
