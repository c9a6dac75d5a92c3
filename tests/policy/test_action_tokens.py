"""OpenVLA's bins: against numpy's digitize, by hand at the edges, and as round trips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadvla.errors import UserError
from roadvla.policy.action_tokens import (
    TABLETOP_STATS,
    NormStats,
    bins_of_token_ids,
    decode_bins,
    encode_bins,
    token_ids,
)

EDGES = np.linspace(-1.0, 1.0, 256)


def digitized(values: np.ndarray) -> np.ndarray:
    return np.digitize(np.clip(values, -1.0, 1.0), EDGES) - 1


def test_golden_bins_and_token_ids() -> None:
    # 0 lies between edge 127 = -1/255 and edge 128 = +1/255: bin 127, id 31999 - 127 = 31872.
    values = torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0])
    bins = encode_bins(values)
    assert bins.tolist() == [0, 127, 255, 0, 255]
    assert token_ids(bins).tolist() == [31999, 31872, 31744, 31999, 31744]


def test_golden_centres() -> None:
    # Centre i is -1 + (2i + 1)/255; the last bin shares the centre of the one before.
    centres = decode_bins(torch.tensor([0, 127, 254, 255]))
    assert centres.tolist() == pytest.approx([-254 / 255, 0.0, 254 / 255, 254 / 255], abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_and_their_neighbours_match_digitize(dtype: torch.dtype) -> None:
    kind = np.float32 if dtype == torch.float32 else np.float64
    edges = EDGES.astype(kind)
    values = np.concatenate(
        [edges, np.nextafter(edges, kind(-2)), np.nextafter(edges, kind(2)), np.array([0.0], kind)]
    )
    assert encode_bins(torch.from_numpy(values)).numpy().tolist() == digitized(values).tolist()


@given(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=32))
def test_any_float32_matches_digitize(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    assert encode_bins(torch.from_numpy(array)).numpy().tolist() == digitized(array).tolist()


def test_every_bin_survives_decoding_but_the_last() -> None:
    bins = torch.arange(256)
    again = encode_bins(decode_bins(bins))
    assert again.tolist() == [*range(255), 254]
    assert encode_bins(decode_bins(bins).float()).tolist() == again.tolist()


def test_token_ids_invert_and_clip() -> None:
    bins = torch.arange(256)
    assert torch.equal(bins_of_token_ids(token_ids(bins)), bins)
    assert bins_of_token_ids(torch.tensor([32000, 31743, 0])).tolist() == [0, 255, 255]


def test_bins_ascend_with_the_action() -> None:
    assert (encode_bins(torch.linspace(-1, 1, 999)).diff() >= 0).all()


def test_unnormalize_by_hand() -> None:
    # 0.5 (a + 1)(q99 - q01) + q01 with q01 = 1, q99 = 5; the unmasked dimension stays.
    stats = NormStats(q01=(1.0, 1.0), q99=(5.0, 5.0), mask=(True, False))
    units = stats.unnormalize(torch.tensor([[-1.0, -1.0], [0.5, 0.5], [1.0, 1.0]]))
    assert units.tolist() == [[1.0, -1.0], [4.0, 0.5], [5.0, 1.0]]


def test_normalize_by_hand() -> None:
    stats = NormStats(q01=(1.0, 1.0, 2.0), q99=(5.0, 5.0, 2.0), mask=(True, False, True))
    normalized = stats.normalize(torch.tensor([[4.0, 0.5, 2.0], [9.0, 9.0, 9.0]]))
    assert normalized[0].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-8)
    assert normalized[1].tolist() == [1.0, 1.0, 0.0]


@given(st.lists(st.integers(0, 254), min_size=7, max_size=7))
def test_tabletop_actions_round_trip(bins: list[int]) -> None:
    tokens = torch.tensor([bins])
    action = TABLETOP_STATS.decode(tokens)
    assert action.dtype == torch.float32
    assert torch.equal(TABLETOP_STATS.encode(action), tokens)


def test_tabletop_range() -> None:
    low = TABLETOP_STATS.decode(torch.zeros(1, 7, dtype=torch.int64))[0]
    # The lowest centre is 254/255 of the way from the middle: -0.04·254/255 m, -0.35·254/255 rad.
    assert low.tolist() == pytest.approx(
        [-0.04 * 254 / 255] * 3 + [-0.35 * 254 / 255] * 3 + [1 / 510]
    )


def test_coding_error_is_at_most_half_a_bin() -> None:
    action = (torch.rand(500, 7) * 2 - 1) * torch.tensor([0.04] * 3 + [0.35] * 3 + [0.5])
    action[:, 6] += 0.5
    error = (TABLETOP_STATS.decode(TABLETOP_STATS.encode(action)) - action).abs()
    half = torch.tensor([0.04] * 3 + [0.35] * 3 + [0.5]) / 255
    assert (error <= half * (1 + 1e-4)).all()


def test_stats_survive_the_dictionary() -> None:
    assert NormStats.from_dict(TABLETOP_STATS.to_dict()) == TABLETOP_STATS
    no_mask = {"action": {"q01": [0, 0], "q99": [1, 2]}}
    assert NormStats.from_dict(no_mask).mask == (True, True)


@pytest.mark.parametrize(
    "entry",
    [{}, {"action": 3}, {"action": {"q01": [0.0]}}, {"action": {"q01": ["x"], "q99": [1.0]}}],
)
def test_unreadable_stats(entry: dict) -> None:
    with pytest.raises(UserError, match="expected"):
        NormStats.from_dict(entry)


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.inf), (-math.inf, 0.0)]
)
def test_impossible_stats(low: float, high: float) -> None:
    with pytest.raises(UserError, match="dimension 0"):
        NormStats(q01=(low,), q99=(high,), mask=(True,))


def test_stats_of_different_lengths() -> None:
    with pytest.raises(UserError, match="one of each"):
        NormStats(q01=(0.0,), q99=(1.0, 1.0), mask=(True,))
