"""What acts: the policy interface, action tokens, the tiny VLA, and policies on disk."""

from roadvla.policy.action_tokens import NUM_BINS, NUM_TOKENS, TABLETOP_STATS, NormStats
from roadvla.policy.base import Critic, Policy
from roadvla.policy.tiny import TinyArchitecture, TinyVLA
from roadvla.policy.weights import (
    BACKBONE_FOLDER,
    load_backbone,
    load_policy,
    load_tiny,
    policy_kind,
    save_policy,
)

__all__ = [
    "BACKBONE_FOLDER",
    "NUM_BINS",
    "NUM_TOKENS",
    "TABLETOP_STATS",
    "Critic",
    "NormStats",
    "Policy",
    "TinyArchitecture",
    "TinyVLA",
    "load_backbone",
    "load_policy",
    "load_tiny",
    "policy_kind",
    "save_policy",
]
