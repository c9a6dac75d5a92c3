"""The tree of successes: what is the same shares a node, what is most like is found."""

from __future__ import annotations

from dataclasses import fields
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roadvla.envs.base import Snapshot
from roadvla.privileged.mcts import ACTION_CELL, SuccessTree, state_features


def states(*x: float) -> torch.Tensor:
    """States that differ in the first number alone."""
    return torch.nn.functional.pad(torch.tensor(x)[:, None], (0, 7))


def actions(*x: float) -> torch.Tensor:
    return torch.nn.functional.pad(torch.tensor(x)[:, None], (0, 6))


def test_features_are_seen_from_the_tip():
    snapshot = Snapshot(
        tip=torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]]),
        objects=torch.tensor([[[0.2, 0.2, 0.0], [9.0, 9.0, 9.0]]]).expand(2, 2, 3),
        receptacles=torch.tensor([[[0.0, 0.0, 0.0]]]).expand(2, 1, 3),
        held=torch.tensor([0, 1]),  # of another object: not the one that counts
        is_open=torch.tensor([False, True]),
        usual_place=torch.zeros(2),
    )
    moved = Snapshot(**{f.name: getattr(snapshot, f.name) for f in fields(Snapshot)})
    moved.tip[:] += 0.0
    features = state_features(moved)
    torch.testing.assert_close(
        features,
        torch.tensor(
            [
                [0.1, 0.0, -0.3, -0.1, -0.2, -0.3, 0.3, 0.0],
                [0.1, 0.0, -0.3, -0.1, -0.2, -0.3, 0.0, 0.3],
            ]
        ),
    )


def test_the_same_transition_shares_a_node_and_averages_its_value():
    tree = SuccessTree.empty().grow(states(0.0, 0.001, 0.1), actions(0.0, 0.0, 0.0),
                                    torch.tensor([1.0, 0.0, 0.5]))  # fmt: skip
    assert tree.size == 2
    assert tree.visits.tolist() == [2, 1]
    assert tree.q.tolist() == [0.5, 0.5]
    tree = tree.grow(states(0.0), actions(0.0), torch.tensor([2.0]))
    assert tree.visits.tolist() == [3, 1]
    assert tree.q[0] == pytest.approx(1.0)
    assert tree.features[0, 0] == pytest.approx(0.001 / 3)
    assert tree.born.tolist() == [0, 0]


def test_other_actions_in_the_same_state_are_branches():
    tree = SuccessTree.empty().grow(states(0.0, 0.0), actions(0.0, 0.04), torch.tensor([0.2, 0.9]))
    assert tree.size == 2
    action, q = tree.retrieve(states(0.002))
    assert (action[0, 0], q[0]) == (pytest.approx(0.04), pytest.approx(0.9))


finite = st.floats(-0.3, 0.3, width=32)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 8))
def test_retrieval_is_a_search_over_all_nodes(seed, nodes, queries):
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(nodes, 8, generator=generator)
    action = torch.rand(nodes, 7, generator=generator)
    tree = SuccessTree.empty().grow(features, action, torch.rand(nodes, generator=generator))
    wanted = torch.rand(queries, 8, generator=generator)
    # A few queries at a time, as with thousands of environments and a full tree.
    with patch("roadvla.privileged.mcts._DISTANCES", 40):
        found, q = tree.retrieve(wanted)
    assert all(map(torch.equal, (found, q), tree.retrieve(wanted)))
    for row in range(queries):
        distances = [sum((a - b) ** 2 for a, b in zip(node, wanted[row].tolist(), strict=True))
                     for node in tree.features.tolist()]  # fmt: skip
        best = min(range(tree.size), key=lambda i: distances[i])
        assert torch.equal(found[row], tree.action[best])
        assert q[row] == tree.q[best]


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_growing_counts_every_visit(seed):
    generator = torch.Generator().manual_seed(seed)
    tree = SuccessTree.empty()
    q = torch.zeros(0)
    for count in (5, 1, 9):
        features = (torch.rand(count, 8, generator=generator) * 2).round() * 0.1
        action = (torch.rand(count, 7, generator=generator) * 2).round() * max(ACTION_CELL)
        new = torch.rand(count, generator=generator)
        tree, q = tree.grow(features, action, new), torch.cat([q, new])
    assert int(tree.visits.sum()) == 15
    assert float((tree.q * tree.visits).sum()) == pytest.approx(float(q.sum()), rel=1e-5)
    assert tree.growths == 3


def test_of_too_many_the_least_visited_go_and_of_those_the_oldest():
    tree = SuccessTree.empty()
    for x in (0.0, 0.1, 0.2, 0.1):
        tree = tree.grow(states(x), actions(0.0), torch.tensor([x]), capacity=2)
    # 0.0 was the oldest of three with one visit; then 0.1, visited twice, stays with 0.2.
    assert sorted(tree.q.tolist()) == pytest.approx([0.1, 0.2])
    assert sorted(tree.visits.tolist()) == [1, 2]


def test_an_empty_tree_says_so():
    with pytest.raises(ValueError, match="no rollout has succeeded yet"):
        SuccessTree.empty().retrieve(states(0.0))


def test_a_tree_is_put_together_again_bit_for_bit():
    tree = SuccessTree.empty().grow(states(0.0, 0.3), actions(0.1, 0.2), torch.tensor([0.5, 1.0]))
    again = SuccessTree.from_tensors(tree.tensors())
    for name, tensor in tree.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("q"),
        lambda t: t.update(more=t["q"]),
        lambda t: t.update(q=t["q"][:1]),
        lambda t: t.update(visits=t["visits"].float()),
        lambda t: t.update(action=t["action"][:, :6]),
    ],
)
def test_a_damaged_tree_is_refused(change):
    tree = SuccessTree.empty().grow(states(0.0, 0.3), actions(0.1, 0.2), torch.tensor([0.5, 1.0]))
    tensors = tree.tensors()
    change(tensors)
    with pytest.raises(ValueError, match=r"expected|is torch"):
        SuccessTree.from_tensors(tensors)
