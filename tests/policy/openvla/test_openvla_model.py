"""The native model against transformers' own forward pass, on checkpoints of several shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from roadvla.errors import UserError
from roadvla.policy.action_tokens import token_ids
from roadvla.policy.openvla import OpenVLA
from roadvla.policy.openvla.tiny_checkpoint import TinySizes, write_tiny_checkpoint

SIZES = {
    "plain": TinySizes(),
    "grouped": TinySizes(hidden=64, heads=4, kv_heads=2, layers=3, rms_norm_eps=1e-5),
    "single tower": TinySizes(single_tower=True, layers=1),
}


@pytest.fixture(scope="module", params=SIZES, ids=SIZES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenVLA:
    folder = tmp_path_factory.mktemp("openvla") / "tiny"
    write_tiny_checkpoint(folder, seed=3, sizes=SIZES[request.param])
    model = OpenVLA.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # biases and norms that do nothing would hide mistakes
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def pixels(model: OpenVLA) -> Tensor:
    images = torch.randint(
        0, 256, (3, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return model.preprocess(images)


@pytest.fixture(scope="module")
def prompts(model: OpenVLA) -> list[list[int]]:
    return [model.prompt_ids(text) for text in ("put carrot on plate", "put", "put red ball on it")]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(2))


def oracle(model: OpenVLA, pixels: Tensor, prompt: list[int], actions: list[int]) -> Tensor:
    """Logits [7, 256] and final states of one row by ``transformers`` alone, without padding."""
    llama = model.language_model
    ids = torch.tensor([[*prompt, *token_ids(torch.tensor(actions[:6])).tolist()]])
    text = llama.model.embed_tokens(ids)
    patches = model.projector(model.vision_backbone(pixels))
    x = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
    logits = llama(inputs_embeds=x).logits[0, -7:]
    return logits[:, 31744:32000].flip(-1)


def test_evaluate_agrees_with_transformers(
    model: OpenVLA, pixels: Tensor, prompts: list[list[int]], tokens: Tensor
) -> None:
    logits, _ = model.evaluate(pixels, prompts, tokens)
    for row in range(3):
        wanted = oracle(model, pixels[row : row + 1], prompts[row], tokens[row].tolist())
        torch.testing.assert_close(logits[row], wanted, atol=3e-5, rtol=1e-5)


def test_unequal_prompts_change_nothing(
    model: OpenVLA, pixels: Tensor, prompts: list[list[int]], tokens: Tensor
) -> None:
    assert len({len(prompt) for prompt in prompts}) > 1
    logits, value = model.evaluate(pixels, prompts, tokens)
    together = model.act(pixels, prompts, temperature=0.0)
    for row in range(3):
        one = slice(row, row + 1)
        alone, alone_value = model.evaluate(pixels[one], prompts[one], tokens[one])
        torch.testing.assert_close(logits[one], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(value[one], alone_value, atol=1e-5, rtol=1e-5)
        acted = model.act(pixels[one], prompts[one], temperature=0.0)
        assert torch.equal(together.action_tokens[one], acted.action_tokens)
        torch.testing.assert_close(together.value[one], acted.value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.value, value, atol=1e-5, rtol=1e-5)


def test_what_acted_is_what_is_evaluated(
    model: OpenVLA, pixels: Tensor, prompts: list[list[int]]
) -> None:
    generator = torch.Generator().manual_seed(5)
    output = model.act(pixels, prompts, temperature=0.7, generator=generator)
    logits, _ = model.evaluate(pixels, prompts, output.action_tokens)
    assert output.logits is not None
    torch.testing.assert_close(output.logits, logits, atol=3e-5, rtol=1e-5)
    log_probs = (logits / 0.7).log_softmax(-1).gather(-1, output.action_tokens.unsqueeze(-1))
    torch.testing.assert_close(output.log_probs, log_probs.squeeze(-1), atol=3e-5, rtol=1e-5)
    again = model.act(pixels, prompts, temperature=0.7, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.action_tokens, output.action_tokens)


def test_all_bins_can_be_drawn(model: OpenVLA, pixels: Tensor, prompts: list[list[int]]) -> None:
    """No hidden top-k: at a high temperature far more than 50 of the bins occur."""
    many = 64
    output = model.act(
        pixels[:1].expand(many, -1, -1, -1),
        prompts[:1] * many,
        temperature=50.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(output.action_tokens[:, 1:].unique()) > 120


def test_recomputed_activations_change_nothing(
    model: OpenVLA, pixels: Tensor, prompts: list[list[int]], tokens: Tensor
) -> None:
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        logits, value = model.evaluate(pixels, prompts, tokens)
        model.zero_grad()
        (logits.square().mean() + value.mean()).backward()
        weight = model.projector.fc1.weight
        gradients.append(weight.grad.clone() if weight.grad is not None else None)
    model.recompute = False
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert gradients[0].abs().sum() > 0
    assert torch.equal(gradients[0], gradients[1])


def test_bfloat16(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "tiny")
    model = OpenVLA.from_pretrained(tmp_path / "tiny")
    exact = OpenVLA.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    assert model.dtype == torch.bfloat16
    assert model.value_head.head_l1.weight.dtype == torch.float32
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    prompts = [model.prompt_ids("put carrot on plate")] * 2
    tokens = torch.randint(0, 256, (2, 7))
    logits, value = model.evaluate(model.preprocess(images), prompts, tokens)
    assert logits.dtype == value.dtype == torch.float32
    wanted, _ = exact.evaluate(exact.preprocess(images), prompts, tokens)
    assert (logits - wanted).abs().mean() < 0.05 * wanted.std()
    output = model.act(model.preprocess(images), prompts, temperature=1.0)
    assert output.log_probs.dtype == torch.float32


def test_statistics_by_key(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "tiny")
    model = OpenVLA.from_pretrained(tmp_path / "tiny")
    tokens = torch.zeros(1, 7, dtype=torch.int64)
    with pytest.raises(UserError, match=r"'bridge'.*there are tabletop"):
        model.decode_actions(tokens, "bridge")
    stats = model.architecture.norm_stats
    stats["other"] = stats["tabletop"]
    with pytest.raises(UserError, match=r"2 data sets \(other, tabletop\).*--norm-key"):
        model.decode_actions(tokens)
    assert model.decode_actions(tokens, "other").dtype == torch.float64


def test_statistics_of_a_fine_tuned_run_replace_the_checkpoint_s(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    entry = OpenVLA.from_pretrained(folder).architecture.norm_stats["tabletop"]
    (folder / "dataset_statistics.json").write_text(json.dumps({"sft": entry}))
    model = OpenVLA.from_pretrained(folder)
    assert model.architecture.norm_stats == {"sft": entry}


COMPILED = """
import sys, torch
from roadvla.policy.openvla import OpenVLA

model = OpenVLA.from_pretrained(sys.argv[1], dtype=torch.float32)
pixels = model.preprocess(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
prompts = [model.prompt_ids("put carrot on plate"), model.prompt_ids("put carrot")]
tokens = torch.randint(0, 256, (2, 7))
plain, value = model.evaluate(pixels, prompts, tokens)
acted = model.act(pixels, prompts, temperature=0.0)
model.compile_blocks()
logits, compiled_value = model.evaluate(pixels, prompts, tokens)
torch.testing.assert_close(logits, plain, atol=3e-5, rtol=1e-5)
torch.testing.assert_close(compiled_value, value, atol=3e-5, rtol=1e-5)
again = model.act(pixels, prompts, temperature=0.0)
assert torch.equal(again.action_tokens, acted.action_tokens)
counted = torch._dynamo.utils.counters
assert counted["stats"]["unique_graphs"] > 0 and not counted["graph_break"], counted
"""


@pytest.mark.slow
def test_compiled_blocks_change_nothing(tmp_path: Path) -> None:
    """In a process of its own: type checks at run time cannot be compiled."""
    folder = write_tiny_checkpoint(tmp_path / "tiny", sizes=TinySizes(image_size=56))
    subprocess.run([sys.executable, "-c", COMPILED, str(folder)], check=True)


def test_bad_input(model: OpenVLA, pixels: Tensor, prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="temperature"):
        model.act(pixels, prompts, temperature=-1.0)
    with pytest.raises(UserError, match="prompts have 0 to"):
        model.act(pixels, [prompts[0], prompts[1], []], temperature=1.0)
    with pytest.raises(UserError, match="1 to 1785 are needed"):
        model.act(pixels[:1], [[1] * 1786], temperature=1.0)
    with pytest.raises(UserError, match="unknown preprocessing method 'pill'"):
        model.preprocess(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), method="pill")
