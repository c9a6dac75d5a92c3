"""What a checkpoint says of its network: sizes from tensors; refusals of what is unknown."""

from __future__ import annotations

import json
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
    text = read(parts).text
    assert (text["rms_norm_eps"], text["max_position_embeddings"]) == (1e-6, 2048)
    assert text["num_key_value_heads"] == text["num_attention_heads"]
    config["text_config"]["num_key_value_heads"] = None
    assert read(parts).text["num_key_value_heads"] == text["num_attention_heads"]
    assert text["rope_theta"] == 10000.0


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
