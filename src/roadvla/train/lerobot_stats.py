"""Statistics of a LeRobot dataset's features, by its names, over one episode or over all.

They are of every frame and every pixel; LeRobot's own samples frames and pixels, and bounds its
quantiles by histograms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Real, UInt8

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}

Stats = dict[str, np.ndarray]
"""min, max, mean, std, count and ``QUANTILES``."""


def of_numbers(values: Real[np.ndarray, "S D"]) -> Stats:
    """Describe each column of a feature that is numbers, of S frames."""
    wide = values.astype(np.float64)
    quantiles = np.quantile(wide, list(QUANTILES.values()), axis=0)
    return {
        "min": wide.min(axis=0),
        "max": wide.max(axis=0),
        "mean": wide.mean(axis=0),
        "std": wide.std(axis=0),
        "count": np.array([len(wide)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def count_levels(image: UInt8[np.ndarray, "S H W C"]) -> Int[np.ndarray, "C L"]:
    """Count how often each of the 256 levels occurs in each channel; counts add up."""
    channels = range(image.shape[-1])
    return np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in channels])


def of_levels(counts: Int[np.ndarray, "C L"], frames: int) -> Stats:
    """Describe each channel of frames whose levels were counted, as fractions of 255: [C, 1, 1]."""
    level = np.arange(256) / 255
    total = counts.sum(axis=1)
    mean = counts @ level / total
    variance = counts @ level**2 / total - mean**2
    below = counts.cumsum(axis=1)

    def per_channel(choose: Callable[[np.ndarray], int]) -> Float[np.ndarray, " C"]:
        return np.array([level[choose(row)] for row in below])

    found = {
        "min": per_channel(lambda row: int(np.argmax(row > 0))),
        "max": per_channel(lambda row: int(np.argmax(row == row[-1]))),
        "mean": mean,
        "std": np.sqrt(np.maximum(variance, 0)),
        **{
            name: per_channel(lambda row, q=q: int(np.argmax(row >= q * row[-1])))
            for name, q in QUANTILES.items()
        },
    }
    shaped = {name: value[:, None, None] for name, value in found.items()}
    return {**shaped, "count": np.array([frames])}
