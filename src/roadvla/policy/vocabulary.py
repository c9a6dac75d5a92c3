"""Word-level tokenizer of the tiny policy: a fixed list of words, numbers spelled by character."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from roadvla.errors import UserError

PAD = 0
UNKNOWN = 1
MAX_PROMPT = 128

# A word's id is its place in this tuple. Weights depend on it: only ever append.
WORDS: tuple[str, ...] = (
    *("<pad>", "<unk>"),
    # Instructions.
    *("put", "on", "plate", "ball", "cube", "carrot", "brick"),
    *("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white", "black", "pink"),
    *("brown", "gray"),
    # Pretraining prompts.
    *("reach", "touch", "point", "at", "above", "over", "move", "to", "go", "lift", "the", "what"),
    *("gripper", "where", "which", "is", "of", "from", "in", "into", "onto", "near", "between"),
    *("up", "down", "forward", "backward", "front", "center", "table", "turn", "pick", "drop"),
    *(
        "release",
        "hold",
        "stay",
        "push",
        "away",
        "there",
        "color",
        "shape",
        "a",
        "an",
        "it",
        "then",
    ),
    # Hints.
    *("hint", "q", "rotate", "open", "closed", "close", "left", "right", "ahead", "behind"),
    *("below", "grasped", "not", "and", "or", "reference", "plan", "for", "current", "state"),
    *("approach", "object", "align", "aligned", "grasping", "grasp", "toward", "towards", "target"),
    *("placement", "place", "placed", "retract", "with", "by", "step", "done", "far", "no", "yes"),
    *("value", "action", "success", "receptacle", "held", "empty"),
    # Numbers, one character at a time.
    *("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "-", "."),
)

_IDS = {word: index for index, word in enumerate(WORDS)}
_REMEMBERED = 65536
_PIECES = re.compile(r"[a-z]+|[+-]?\d+(?:\.\d+)?")


def split(text: str) -> list[str]:
    """Cut text into lower-case words and the characters of its numbers; drop punctuation."""
    pieces = _PIECES.findall(text.lower().replace("−", "-"))
    return [token for piece in pieces for token in ([piece] if piece.isalpha() else piece)]


class Tokenizer:
    """Instructions to prompt ids, remembering every string it has met.

    Args:
        vocabulary_size: Ids at or beyond it are unknown: weights trained before a word was
            appended have no embedding for it.
        max_prompt: Longest prompt in tokens.
    """

    def __init__(self, vocabulary_size: int = len(WORDS), max_prompt: int = MAX_PROMPT) -> None:
        self.vocabulary_size = vocabulary_size
        self.max_prompt = max_prompt
        self._known: dict[str, list[int]] = {}

    def __call__(self, instructions: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids padded on the right with 0, to an even length; text without a word is unknown.

        Raises:
            UserError: If an instruction is longer than ``max_prompt`` tokens.
        """
        rows = [self._known.get(text) or self._learn(text) for text in instructions]
        length = max((len(row) for row in rows), default=0)
        length += length % 2
        return torch.tensor([row + [PAD] * (length - len(row)) for row in rows]).reshape(-1, length)

    def _learn(self, text: str) -> list[int]:
        row = [_IDS.get(token, UNKNOWN) for token in split(text)] or [UNKNOWN]
        if len(row) > self.max_prompt:
            raise UserError(
                f"instruction of {len(row)} tokens ({text[:40]!r}…): "
                f"the policy reads at most {self.max_prompt}; shorten it"
            )
        row = [index if index < self.vocabulary_size else UNKNOWN for index in row]
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[text] = row
        return row
