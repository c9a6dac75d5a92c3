"""What a checkpoint says of its network: sizes from tensors; refusals of what is unknown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from roadvla.errors import UserError
from roadvla.policy.openvla import OpenVLA
from roadvla.policy.openvla.architecture import Architecture, is_dead, read_architecture
from roadvla.policy.openvla.checkpoint import open_checkpoint
from roadvla.policy.openvla.tiny_checkpoint import TinySizes, write_tiny_checkpoint

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def parts(folder: Path) -> tuple[Config, Shapes]:
    checkpoint = open_checkpoint(folder)
    return json.loads(json.dumps(checkpoint.config)), dict(checkpoint.shapes)


def read(parts: tuple[Config, Shapes]) -> Architecture:
    return read_architecture(*parts, source="config.json")


def text(config: Config, **changes: object) -> None:
    config["text_config"].update(changes)


def test_sizes(parts: tuple[Config, Shapes]) -> None:
    architecture = read(parts)
    sizes = TinySizes()
    assert architecture.hidden == sizes.hidden
    assert len(architecture.towers) == 2
    dino, siglip = architecture.towers
    assert (dino.registers, dino.class_token, dino.layer_scale) == (4, True, True)
    assert (siglip.registers, siglip.class_token, siglip.layer_scale) == (0, False, False)
    blocks = {n.split(".")[3] for n in parts[1] if n.startswith("vision_backbone.featurizer.bl")}
    assert dino.depth == len(blocks) - 1
    assert architecture.prompt_style == "openvla"
    assert architecture.max_prompt == 2048 - architecture.patches - 7


def test_what_the_export_leaves_out(parts: tuple[Config, Shapes]) -> None:
    """OpenVLA's text_config lacks these; Llama-2's own files would say 1e-5 and 4096."""
    config, _ = parts
    for name in ("rms_norm_eps", "max_position_embeddings", "num_key_value_heads"):
        config["text_config"].pop(name, None)
    found = read(parts).text
    assert (found["rms_norm_eps"], found["max_position_embeddings"]) == (1e-6, 2048)
    assert found["num_key_value_heads"] == found["num_attention_heads"]
    config["text_config"]["num_key_value_heads"] = None
    assert read(parts).text["num_key_value_heads"] == found["num_attention_heads"]
    assert found["rope_theta"] == 10000.0


def test_other_ways_to_say_the_same(parts: tuple[Config, Shapes]) -> None:
    config, _ = parts
    usual = read(parts)
    config["image_sizes"], config["text_config"]["pad_token_id"] = 224, None
    assert read(parts) == usual
    config["pad_token_id"] = 7
    assert read(parts).pad_token_id == 7


def test_a_text_config_that_transformers_refuses(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    config = json.loads((bad / "config.json").read_text())
    config["text_config"]["attention_dropout"] = "none"
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="text_config describes no Llama that transformers can"):
        OpenVLA.from_pretrained(bad)


def test_vicuna_means_v01(parts: tuple[Config, Shapes]) -> None:
    parts[0]["llm_backbone_id"] = "vicuna-v15-7b"
    assert read(parts).prompt_style == "openvla-v01"


def test_dead_tensors(parts: tuple[Config, Shapes]) -> None:
    architecture = read(parts)
    dead = {name for name in parts[1] if is_dead(name, architecture)}
    last = {
        t: architecture.towers[i].depth for i, t in enumerate(("featurizer.", "fused_featurizer."))
    }
    assert dead == {
        name
        for name in parts[1]
        for tower, depth in last.items()
        if name.startswith(
            tuple(
                f"vision_backbone.{tower}{rest}"
                for rest in (f"blocks.{depth}.", "norm.", "attn_pool.")
            )
        )
    }
    assert not is_dead("language_model.model.norm.weight", architecture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, _: c["text_config"].update(tie_word_embeddings=True), "tied word embeddings"),
        (lambda c, _: c["text_config"].update(hidden_act="gelu"), "'llama' with 'gelu'"),
        (lambda c, _: c["text_config"].update(model_type="mistral"), "'mistral' with 'silu'"),
        (lambda c, _: c["text_config"].update(hidden_size=0), "hidden_size is 0"),
        (lambda c, _: c.update(timm_override_act_layers=["quick_gelu", None]), "quick_gelu"),
        (
            lambda c, _: c.update(timm_model_ids=["a"]),
            r"timm_model_ids is \['a'\].*2 vision towers",
        ),
        (lambda c, _: c.update(pad_to_multiple_of=128), "action tokens would mean something else"),
        (lambda c, _: c.update(n_action_bins=512), "n_action_bins 512"),
        (lambda c, _: c.update(image_sizes=[224, 384]), "one common size"),
        (lambda c, _: c.update(image_sizes=[448, 448]), "256 patch positions.* make 1024"),
        (
            lambda c, _: c.update(timm_model_kwargs=None, timm_model_ids=["vit_x", "vit_y"]),
            "vision tower 'vit_x' is not supported; known are vit_large_patch14_reg4_dinov2",
        ),
        (
            lambda c, _: c["timm_model_kwargs"][0].update(num_heads=5),
            "no multiple of its 5 heads",
        ),
        (lambda c, _: c.update(text_config=None), "text_config is None; an object"),
        (lambda c, _: c.update(text_config=[1]), r"text_config is \[1\]; an object"),
        (lambda c, _: c.update(norm_stats=[1]), r"norm_stats is \[1\]; an object"),
        (lambda c, _: c.update(image_sizes="224"), "image_sizes is '224'; a list of int"),
        (lambda c, _: c.update(image_sizes=[224, -1]), "image_sizes is .* positive numbers"),
        (lambda c, _: c.update(timm_model_ids=5), "timm_model_ids is 5; a list of str"),
        (lambda c, _: c.update(timm_model_kwargs=[{}]), "timm_model_kwargs has 1 entries, not 2"),
        (lambda c, _: c["timm_model_kwargs"][0].update(num_heads="x"), "num_heads is 'x'"),
        (lambda c, _: c.update(pad_to_multiple_of="x"), "pad_to_multiple_of x"),
        (lambda c, _: text(c, num_attention_heads=5), "hidden_size 64 is no multiple of .* 5"),
        (lambda c, _: text(c, num_attention_heads="four"), "num_attention_heads is 'four'"),
        (lambda c, _: text(c, num_hidden_layers=True), "num_hidden_layers is True"),
        (lambda c, _: text(c, num_key_value_heads=3), "4 is no multiple of num_key_value_heads 3"),
        (lambda c, _: text(c, rope_theta="x"), "rope_theta is 'x'; a positive number"),
        (lambda c, _: text(c, head_dim=-2), "head_dim is -2"),
        (lambda c, _: text(c, pad_token_id=-1), "pad_token_id is -1; a token id below 32064"),
        (lambda c, _: text(c, pad_token_id=32064), "pad_token_id is 32064; a token id below"),
        (
            lambda _, s: s.update({"vision_backbone.featurizer.pos_embed": (256, 48)}),
            r"pos_embed is \(256, 48\); 1 x patches x width",
        ),
        (
            lambda _, s: s.pop("vision_backbone.featurizer.patch_embed.proj.weight"),
            "no vision_backbone.featurizer.patch_embed.proj.weight: it is incomplete",
        ),
        (
            lambda _, s: s.pop("language_model.model.embed_tokens.weight"),
            "embed_tokens.weight is missing",
        ),
        (
            lambda _, s: [
                s.pop(n) for n in list(s) if ".featurizer.blocks." in n and ".blocks.0." not in n
            ],
            "blocks are 1; at least 2",
        ),
    ],
)
def test_refusals(
    parts: tuple[Config, Shapes], change: Callable[[Config, Shapes], object], message: str
) -> None:
    change(*parts)
    with pytest.raises(UserError, match=message):
        read(parts)


def test_real_towers_need_no_sizes(parts: tuple[Config, Shapes]) -> None:
    config, shapes = parts
    config.pop("timm_model_kwargs")
    for name in list(shapes):
        if name.endswith("pos_embed"):
            shapes[name] = (1, 256, 1024 if ".featurizer" in name else 1152)
    assert [tower.heads for tower in read(parts).towers] == [16, 16]


def test_split_projections_are_the_packed_ones(folder: Path, tmp_path: Path) -> None:
    """Queries, keys and values from three layers: the same network, stored differently."""
    split = tmp_path / "split"
    split.mkdir()
    for path in folder.iterdir():
        (split / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".attn.qkv." in n]:
        for part, tensor in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace("qkv", f"{part}_proj")] = tensor.clone()
    save_file(tensors, split / "model.safetensors")
    one, other = (OpenVLA.from_pretrained(f, dtype=torch.float32) for f in (folder, split))
    pixels = one.preprocess(torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8))
    assert not other.architecture.towers[0].packed
    torch.testing.assert_close(one.vision_backbone(pixels), other.vision_backbone(pixels))
