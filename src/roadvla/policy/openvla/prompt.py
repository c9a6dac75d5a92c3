"""Instructions to the token ids that an OpenVLA was trained to read before its action."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from roadvla.errors import UserError
from roadvla.policy.openvla.architecture import PromptStyle

BOS = 1
BEFORE_ACTION = 29871
"""Id of a lone space, which every training prompt ends with: actions follow it."""

TOKENIZER_NAME = "tokenizer.json"

TEMPLATES: dict[PromptStyle, str] = {
    "openvla": "In: What action should the robot take to {instruction}?\nOut:",
    "openvla-v01": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: What action "
        "should the robot take to {instruction}? ASSISTANT:"
    ),
}
"""What each family of checkpoints was trained with, word for word."""

_LLAMA_IDS = {"<unk>": 0, "<s>": BOS, "</s>": 2, "▁": BEFORE_ACTION}
_REMEMBERED = 65536
_FIX = (
    "copy tokenizer.json, tokenizer_config.json, special_tokens_map.json and added_tokens.json of "
    "openvla/openvla-7b there"
)


def prompt_text(instruction: str, style: PromptStyle) -> str:
    """Put an instruction, in lower case, into the sentence a checkpoint was trained with.

    Sources: openvla/openvla, ``vla-scripts/deploy.py``; RL4VLA adds a space after ``Out:``, which
    is the token 29871 that ``PromptTokenizer`` ends with.
    """
    return TEMPLATES[style].replace("{instruction}", instruction.lower())


class PromptTokenizer:
    """Instructions to prompt ids [BOS, …, 29871], remembering every string it has met.

    Only the tokenizer's text rules are used. BOS and the last id are put by hand, whatever the
    file says about special tokens, padding or truncation: those settings record how somebody last
    called the tokenizer, not how the model was trained.

    Args:
        folder: Of the checkpoint; holds ``tokenizer.json``.
        style: Whose prompt to use.
        max_prompt: Longest prompt in tokens, BOS and 29871 included.

    Raises:
        UserError: If ``tokenizer.json`` is missing, damaged, or not Llama-2's.
    """

    def __init__(self, folder: Path, *, style: PromptStyle, max_prompt: int) -> None:
        self.style: PromptStyle = style
        self.max_prompt = max_prompt
        self._tokenizer = _read_tokenizer(Path(folder))
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, instruction: str) -> list[int]:
        """Ids of the whole prompt of one instruction.

        Raises:
            UserError: If the prompt is longer than ``max_prompt`` tokens.
        """
        known = self._known.get(instruction)
        return list(self._learn(instruction) if known is None else known)

    def _learn(self, instruction: str) -> tuple[int, ...]:
        text = prompt_text(instruction, self.style)
        words = self._tokenizer.encode(text, add_special_tokens=False).ids
        ids = [BOS, *words, BEFORE_ACTION]
        if len(ids) > self.max_prompt:
            raise UserError(
                f"instruction {instruction[:40]!r}… makes a prompt of {len(ids)} tokens: the "
                f"policy reads at most {self.max_prompt}; shorten it"
            )
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        row = self._known[instruction] = tuple(ids)
        return row


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        also = (
            " (tokenizer.model alone is not read)" if (folder / "tokenizer.model").exists() else ""
        )
        raise UserError(f"{path} is missing{also}: {_FIX}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path} is no readable tokenizer ({error}): {_FIX}") from error
    for token, expected in _LLAMA_IDS.items():
        found = tokenizer.token_to_id(token)
        if found is not None and found != expected:
            raise UserError(
                f"{path} gives {token!r} the id {found}, Llama-2's tokenizer gives it {expected}: "
                f"it belongs to another model; {_FIX}"
            )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
