"""A small tokenizer of Llama-2's kind, for tiny checkpoints: few words, the real ids of the frame.

The real tokenizer's file is Meta's and not shipped. This one has the same rules (byte-pair merges,
bytes for unknown characters, a space mark before the first word) and the same ids wherever
OpenVLA's prompt needs them, but it merges only the words listed here: any other word comes out as
its known beginning and single letters.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from roadvla.policy.openvla.prompt import BEFORE_ACTION, BOS, TEMPLATES
from roadvla.policy.vocabulary import WORDS

SIZE = 32000
"""Ids below the padding token, as in Llama-2."""

_SPACE = "▁"
_FIRST_BYTE = 3
_FIRST_FREE = 259
_SPECIAL = ("<unk>", "<s>", "</s>")
_PAD = "<PAD>"
_CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]

# Llama-2's own ids of everything around the instruction, and of the suite's three commonest words.
_REAL_IDS = {
    "▁": BEFORE_ACTION,
    "▁In": 512,
    "▁What": 1724,
    "▁action": 3158,
    "▁should": 881,
    "▁the": 278,
    "▁robot": 19964,
    "▁take": 2125,
    "▁to": 304,
    "?": 29973,
    "Out": 3744,
    ":": 29901,
    "▁put": 1925,
    "▁on": 373,
    "▁plate": 15284,
}


def make_tiny_tokenizer() -> Tokenizer:
    """Build the tokenizer: 32000 ids and ``<PAD>``, BOS in front, as openvla-7b's.

    A word is merged letter by letter from its space mark, so that every beginning of a word is a
    token too and no merge of one word can spoil another. Ids without a use have placeholders.
    """
    words = [_SPACE + word for word in _words()] + ["Out"]
    merges = _merges(words)
    vocabulary = _vocabulary([*_CHARACTERS, *("".join(pair) for pair in merges)])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*_SPECIAL, _PAD)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _words() -> list[str]:
    """Words of the tabletop's instructions and hints, and of the sentences around them."""
    known = [word for word in WORDS if word.isalpha()]
    frames = " ".join(TEMPLATES.values()).replace("{instruction}", "")
    return list(dict.fromkeys([*known, *re.findall("[A-Za-z]+", frames)]))


def _merges(words: list[str]) -> list[tuple[str, str]]:
    pairs = ((word[:end], word[end]) for word in words for end in range(1, len(word)))
    return list(dict.fromkeys(pairs))


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Give every token an id: the real one where it matters, else the next free one."""
    ids = {token: index for index, token in enumerate(_SPECIAL)}
    ids |= {f"<0x{byte:02X}>": _FIRST_BYTE + byte for byte in range(256)}
    ids |= _REAL_IDS
    taken = set(ids.values())
    free = iter([index for index in range(_FIRST_FREE, SIZE) if index not in taken])
    for token in dict.fromkeys(tokens):
        if token not in ids:
            ids[token] = next(free)
    ids |= {f"<unused_{index}>": index for index in free}
    return dict(sorted(ids.items(), key=lambda item: item[1]))
