"""The word list covers what the suite says and never reorders; numbers are spelled."""

from __future__ import annotations

import hashlib

import pytest

from roadvla.errors import UserError
from roadvla.policy.vocabulary import MAX_PROMPT, PAD, UNKNOWN, WORDS, Tokenizer, split

SHAPES = ("ball", "cube", "carrot", "brick")
COLORS = (
    *("red", "green", "blue", "yellow", "purple", "orange"),
    *("cyan", "white", "black", "pink", "brown", "gray"),
)
HINTS = (
    "Hint (q=1.20): move (+0.05, -0.02, +0.10), rotate (+0.00, +0.05, +0.00), gripper open.",
    "carrot is right, ahead, below gripper, not grasped. plate is ahead, left, below gripper. "
    "carrot to plate: move ahead and left. gripper open.",
    "Reference plan for “put carrot on plate”: 1. Approach the object. 2. Align for grasping. "
    "3. Grasp and lift. 4. Move toward the target. 5. Align for placement. 6. Place and retract. "
    "Current state: carrot is behind, above gripper, grasped. gripper closed.",
)


def test_ids_never_change() -> None:
    # Trained weights index these words: append, and only then extend this count and digest.
    assert len(set(WORDS)) == len(WORDS)
    digest = hashlib.sha256(" ".join(WORDS[:125]).encode()).hexdigest()
    assert digest[:16] == "86ff6a70c4914a6f"


def test_every_instruction_is_known() -> None:
    texts = [f"put {c} {s} on {p} plate" for c in COLORS for s in SHAPES for p in COLORS]
    ids = Tokenizer()(texts)
    assert ids.shape == (len(texts), 6)
    assert (ids > UNKNOWN).all()
    assert len({tuple(row) for row in ids.tolist()}) == len(texts)


@pytest.mark.parametrize("text", HINTS)
def test_hints_are_known_and_fit(text: str) -> None:
    ids = Tokenizer()([text, "put red ball on blue plate. " + text])
    assert (ids != UNKNOWN).all()
    assert ids.shape[1] <= MAX_PROMPT


def test_numbers_are_spelled() -> None:
    assert split("Move -0.02, +1 (q=1.20).") == [
        *("move", "-", "0", ".", "0", "2", "+", "1", "q", "1", ".", "2", "0")
    ]


def test_case_and_punctuation_do_not_matter() -> None:
    ids = Tokenizer()(["Put RED ball, on blue plate!", "put red ball on blue plate"]).tolist()
    assert ids[0] == ids[1]


def test_padding_on_the_right_to_an_even_length() -> None:
    ids = Tokenizer()(["lift", "lift the red"])
    assert ids.shape == (2, 4)
    assert ids[0, 1:].tolist() == [PAD] * 3
    assert ids[1, 3] == PAD


def test_unknown_words_and_empty_text() -> None:
    ids = Tokenizer()(["grab xylophone", "", "?!"])
    assert ids[:, 0].tolist() == [UNKNOWN] * 3
    assert ids.tolist()[1] == [UNKNOWN, PAD]


def test_words_beyond_the_trained_vocabulary_are_unknown() -> None:
    last = WORDS.index("plate")
    ids = Tokenizer(vocabulary_size=last)(["put plate", "put on"])
    assert ids[0].tolist() == [WORDS.index("put"), UNKNOWN]
    assert ids[1].tolist() == [WORDS.index("put"), WORDS.index("on")]


def test_a_remembered_string_gives_the_same_ids() -> None:
    tokenizer = Tokenizer()
    assert tokenizer(["put red ball"]).tolist() == tokenizer(["put red ball"]).tolist()


def test_too_long_a_prompt() -> None:
    assert Tokenizer()(["red " * MAX_PROMPT]).shape == (1, MAX_PROMPT)
    with pytest.raises(UserError, match="129 tokens"):
        Tokenizer()(["red " * (MAX_PROMPT + 1)])
