"""Prompt ids against recorded ones, with tokenizer files as people really have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from roadvla.errors import UserError
from roadvla.policy.openvla.prompt import TEMPLATES, PromptTokenizer, prompt_text
from roadvla.policy.openvla.tiny_checkpoint import write_tiny_checkpoint

BEFORE = [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304]
AFTER = [29973, 13, 3744, 29901, 29871]

# The words of two instructions whose ids were recorded from the real tokenizer (openvla.md, §4).
SOUP = "put both the alphabet soup and the tomato sauce in the basket"
SOUP_PIECES = [
    *("▁put", "▁both", "▁the", "▁alphabet", "▁soup", "▁and", "▁the", "▁tom", "ato", "▁sau", "ce"),
    *("▁in", "▁the", "▁basket"),
]
SOUP_IDS = [1925, 1716, 278, 22968, 22300, 322, 278, 6454, 1219, 12507, 346, 297, 278, 25972]


def _llama() -> Tokenizer:
    """A tokenizer of the kind of openvla-7b's file, with the real ids of what the tests read."""
    frame = ["▁In", ":", "▁What", "▁action", "▁should", "▁the", "▁robot", "▁take", "▁to", "?"]
    real = dict(zip(frame, [*BEFORE[1:], AFTER[0]], strict=True))
    real |= {"Out": 3744, "▁": 29871} | dict(zip(SOUP_PIECES, SOUP_IDS, strict=True))
    words_first = sorted(real, key=lambda token: not token.startswith("▁"))
    merges = list(dict.fromkeys((t[:end], t[end]) for t in words_first for end in range(1, len(t))))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)} | real
    free = iter(sorted(set(range(259, 32000)) - set(vocabulary.values())))
    letters = [chr(code) for code in range(33, 127)]
    for token in (*letters, *("".join(pair) for pair in merges)):
        if token not in vocabulary:
            vocabulary[token] = next(free)
    vocabulary |= {f"<unused_{index}>": index for index in free}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>", "<PAD>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _prompts(folder: Path, style: Any = "openvla", max_prompt: int = 1785) -> PromptTokenizer:
    return PromptTokenizer(folder, style=style, max_prompt=max_prompt)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("made") / "tiny")


# Golden.


def test_ids_of_the_real_tokenizer(llama: Path) -> None:
    assert _prompts(llama)(SOUP) == [*BEFORE, *SOUP_IDS, *AFTER]


def test_ids_are_those_the_original_code_was_fed(llama: Path, openvla_fixture: Path) -> None:
    with np.load(openvla_fixture / "inputs.npz") as arrays:
        right = arrays["tf_input_ids"][0, : int(arrays["prompt_len"][0])].tolist()
        left = arrays["rl_prompt_ids"][0][arrays["rl_prompt_mask"][0] > 0].tolist()
    ours = _prompts(llama)(SOUP)
    assert ours == right == left


def test_the_tiny_tokenizer_has_the_same_frame(tiny: Path, openvla_fixture: Path) -> None:
    with np.load(openvla_fixture / "inputs.npz") as arrays:
        recorded = arrays["rl_prompt_ids"][0].tolist()
    ids = _prompts(tiny)("put red ball on white plate")
    assert ids[:11] == recorded[:11]
    assert ids[-5:] == recorded[-5:]
    assert (ids[13], ids[15]) == (373, 15284)  # on … plate
    assert len(ids) == len(BEFORE) + 6 + len(AFTER)


def test_sentences() -> None:
    assert prompt_text("Put X", "openvla") == (
        "In: What action should the robot take to put x?\nOut:"
    )
    assert prompt_text("Put X", "openvla-v01") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: What action should the robot take to put x? ASSISTANT:"
    )


@pytest.mark.parametrize("style", list(TEMPLATES))
def test_every_prompt_runs_from_bos_to_the_lone_space(tiny: Path, style: str) -> None:
    prompts = _prompts(tiny, style)
    sentence = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for instruction in (
        "",
        "put red ball on white plate",
        "zügig 🥕\n{instruction}",
        "a ",
        "<0x41>",
    ):
        ids = prompts(instruction)
        assert (ids[0], ids[-1], ids.count(1)) == (1, 29871, 1)
        assert sentence.decode(ids[1:-1]) == prompt_text(instruction, style)  # pyright: ignore


def test_an_instruction_that_says_the_placeholder_is_not_filled_in_twice() -> None:
    text = prompt_text("{instruction}", "openvla")
    assert text.count("{instruction}") == 1


# What the file says about special tokens does not matter.


def _with_padding(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(direction="left", pad_id=32000, pad_token="<PAD>", length=64)
    tokenizer.enable_truncation(12)


def _with_end(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def _without_bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.Sequence([])


def _metaspace(tokenizer: Tokenizer) -> None:
    """As transformers writes Llama tokenizers that are not ``legacy``."""
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


@pytest.mark.parametrize("change", [_with_padding, _with_end, _without_bos, _metaspace])
def test_ids_do_not_depend_on_how_the_file_was_saved(
    tmp_path: Path, change: Callable[[Tokenizer], None]
) -> None:
    tokenizer = _llama()
    change(tokenizer)
    assert _prompts(_save(tokenizer, tmp_path))(SOUP) == [*BEFORE, *SOUP_IDS, *AFTER]


def test_merges_written_the_old_way(llama: Path, tmp_path: Path) -> None:
    """The file of openvla-7b holds merges as "a b"; today's library writes ["a", "b"]."""
    content = json.loads((llama / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert _prompts(tmp_path)(SOUP) == [*BEFORE, *SOUP_IDS, *AFTER]


# Memory.


def test_a_prompt_is_remembered_and_cannot_be_spoilt(llama: Path) -> None:
    prompts = _prompts(llama)
    first = prompts(SOUP)
    first.append(0)
    assert prompts(SOUP) == first[:-1]
    assert prompts(SOUP.upper()) == first[:-1]


# Errors.


def test_too_long_a_prompt(llama: Path) -> None:
    length = len(_prompts(llama)(SOUP))
    assert len(_prompts(llama, max_prompt=length)(SOUP)) == length
    with pytest.raises(UserError, match=f"prompt of {length} tokens.*at most {length - 1}"):
        _prompts(llama, max_prompt=length - 1)(SOUP)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json is missing: copy .*openvla/openvla-7b"):
        _prompts(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"tokenizer\.model alone is not read"):
        _prompts(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="no readable tokenizer"):
        _prompts(tmp_path)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    """Its ids would mean other words, without any error later."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 28705}
    other = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    with pytest.raises(UserError, match="'▁' the id 28705, Llama-2's tokenizer gives it 29871"):
        _prompts(_save(other, tmp_path))
