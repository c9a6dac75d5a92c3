"""The tiny checkpoint has every file and tensor of the real one, and the ids of its prompt."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from roadvla.envs.tabletop.scene import COLOURS, SHAPES
from roadvla.errors import UserError
from roadvla.policy.action_tokens import TABLETOP_STATS, NormStats
from roadvla.policy.openvla import tiny_checkpoint
from roadvla.policy.openvla.architecture import read_architecture
from roadvla.policy.openvla.preprocess import read_preprocessing
from roadvla.policy.openvla.tiny_checkpoint import TinySizes, TinyTower, write_tiny_checkpoint
from roadvla.policy.openvla.tiny_weights import draw_tensor, tensor_shapes

ACTIONS = slice(31744, 32000)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("made") / "tiny")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _json(file: Path) -> dict:
    return json.loads(file.read_text())


def test_tensors_are_those_of_the_original_code(tiny: Path, openvla_fixture: Path) -> None:
    assert _shapes(tiny / "model.safetensors") == _shapes(openvla_fixture / "model.safetensors")
    weights = load_file(tiny / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_seven_billion_parameters_at_the_real_sizes() -> None:
    """Totals of openvla.md, section 5: the names and shapes scale to the real checkpoint's."""
    sizes = TinySizes(
        dino=TinyTower(width=1024, depth=24, heads=16),
        siglip=TinyTower(width=1152, depth=27, heads=16),
        hidden=4096,
        intermediate=11008,
        layers=32,
        heads=32,
        kv_heads=32,
    )
    counts = {name: torch.Size(shape).numel() for name, shape in tensor_shapes(sizes)}
    assert len(counts) == 982
    assert sum(counts.values()) == 7_541_237_184
    parts = {
        "vision_backbone.featurizer.": 303_230_976,
        "vision_backbone.fused_featurizer.": 427_680_704,
        "projector.": 71_385_600,
        "language_model.": 6_738_939_904,
    }
    for prefix, total in parts.items():
        assert sum(n for name, n in counts.items() if name.startswith(prefix)) == total


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_settings_are_those_of_the_original_code(
    tiny: Path, openvla_fixture: Path, name: str
) -> None:
    ours, theirs = _json(tiny / name), _json(openvla_fixture / name)
    for chosen in ("norm_stats", "torch_dtype"):
        ours.pop(chosen, None), theirs.pop(chosen, None)
    if name == "config.json":
        assert ours["text_config"].pop("torch_dtype") == "bfloat16"
    assert ours == theirs


def test_norm_stats_are_the_tabletops(tiny: Path, tmp_path: Path) -> None:
    stats = _json(tiny / "config.json")["norm_stats"]
    assert {key: NormStats.from_dict(entry) for key, entry in stats.items()} == {
        "tabletop": TABLETOP_STATS
    }
    other = write_tiny_checkpoint(tmp_path / "two", norm_keys=("a", "b"))
    assert list(_json(other / "config.json")["norm_stats"]) == ["a", "b"]


def test_the_seed_decides_the_weights(tiny: Path, tmp_path: Path) -> None:
    same = write_tiny_checkpoint(tmp_path / "same").joinpath("model.safetensors").read_bytes()
    other = write_tiny_checkpoint(tmp_path / "other", seed=1) / "model.safetensors"
    assert same == (tiny / "model.safetensors").read_bytes()
    assert other.read_bytes() != same


def test_the_first_policy_is_neither_sure_nor_uniform_and_stays_among_the_actions() -> None:
    """At states of unit size, as the final norm makes them."""
    generator = torch.Generator().manual_seed(1)
    head = draw_tensor("language_model.lm_head.weight", (32064, 64), generator).float()
    logits = torch.randn(200, 64, generator=generator) @ head.T
    entropy = torch.distributions.Categorical(logits=logits[:, ACTIONS]).entropy()
    assert 4.0 < entropy.mean() < 4.9  # ln 256 = 5.5
    greedy = logits.argmax(dim=1)
    assert ((greedy >= 31744) & (greedy <= 31999)).float().mean() > 0.98


# Sizes.


def test_grouped_heads_and_norm_eps(tmp_path: Path) -> None:
    sizes = TinySizes(kv_heads=2, rms_norm_eps=1e-5, hidden=32, layers=1)
    folder = write_tiny_checkpoint(tmp_path / "grouped", sizes=sizes)
    shapes = _shapes(folder / "model.safetensors")
    attention = "language_model.model.layers.0.self_attn."
    assert shapes[f"{attention}k_proj.weight"] == shapes[f"{attention}v_proj.weight"] == (16, 32)
    assert shapes[f"{attention}q_proj.weight"] == (32, 32)
    text = read_architecture(_json(folder / "config.json"), shapes, "config.json").text
    assert (text["num_key_value_heads"], text["rms_norm_eps"]) == (2, 1e-5)


def test_a_single_tower_is_siglip_with_vicunas_prompt(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "v01", sizes=TinySizes(single_tower=True))
    shapes = _shapes(folder / "model.safetensors")
    assert shapes["projector.fc1.weight"] == (64, 40)
    assert "projector.fc3.weight" not in shapes
    assert "vision_backbone.featurizer.attn_pool.latent" in shapes
    assert not any("fused_featurizer" in name or "cls_token" in name for name in shapes)
    architecture = read_architecture(_json(folder / "config.json"), shapes, "config.json")
    assert len(architecture.towers) == 1
    assert architecture.prompt_style == "openvla-v01"
    assert read_preprocessing(folder, 1, 224).means == ((0.5, 0.5, 0.5),)


def test_smaller_images_mean_fewer_patches(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "small", sizes=TinySizes(image_size=56))
    shapes = _shapes(folder / "model.safetensors")
    architecture = read_architecture(_json(folder / "config.json"), shapes, "config.json")
    assert (architecture.image_size, architecture.patches) == (56, 16)
    assert read_preprocessing(folder, 2, 56).image_size == (56, 56)


def test_shards_hold_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "sharded", sizes=TinySizes(shards=3))
    whole = load_file(tiny / "model.safetensors")
    index = _json(folder / "model.safetensors.index.json")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())
    for file in files:
        part = load_file(folder / file)
        assert part
        for name, weight in part.items():
            assert index["weight_map"][name] == file
            assert torch.equal(weight, whole[name])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"heads": 3}, "multiple of 3 heads"),
        ({"kv_heads": 3}, "3 kv_heads"),
        ({"layers": 0}, "at least 1"),
        ({"image_size": 100}, "multiple of 14"),
        ({"shards": 0}, "shards is 0"),
    ],
)
def test_impossible_sizes(wrong: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TinySizes(**wrong)


@pytest.mark.parametrize(("width", "depth", "heads"), [(48, 1, 4), (48, 3, 5), (48, 3, 0)])
def test_impossible_towers(width: int, depth: int, heads: int) -> None:
    with pytest.raises(UserError, match="vision tower"):
        TinyTower(width=width, depth=depth, heads=heads)


# The folder.


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_tiny_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        write_tiny_checkpoint(tmp_path / "notes.txt", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny_checkpoint(folder, sizes=TinySizes(shards=2))
    (folder / "notes.txt").write_text("mine")
    (folder / "value_head.safetensors").write_bytes(b"of the old weights")
    write_tiny_checkpoint(folder, force=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_cut_off_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        write_tiny_checkpoint(tmp_path / "tiny")
    assert not list(tmp_path.iterdir())


# The tokenizer.


def test_every_word_of_the_suite_is_one_token(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for colour, shape, plate in product(COLOURS, SHAPES, COLOURS):
        text = f"put {colour} {shape} on {plate} plate"
        encoding = tokenizer.encode(text)
        assert encoding.tokens == ["<s>", *(f"▁{word}" for word in text.split())]
        assert tokenizer.decode(encoding.ids) == text


def test_the_frame_has_llamas_ids(tiny: Path) -> None:
    """From openvla.md, section 4: recorded from the real tokenizer."""
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "In: What action should the robot take to put red ball on white plate?\nOut: "
    ids = tokenizer.encode(text).ids
    assert ids[:11] == [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 1925]
    assert ids[-6:] == [15284, 29973, 13, 3744, 29901, 29871]
    assert tokenizer.token_to_id("<PAD>") == 32000
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]


def test_unknown_text_falls_back_to_letters_and_bytes(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    ids = tokenizer.encode("zügig é").ids
    assert 0 not in ids
    assert ids[3:5] == [3 + 0xC3, 3 + 0xBC]  # ü in UTF-8
    for text in ("zügig é", "putting 3 zebras; 日本", "Put THE {plate} 🥕"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_reads_the_same_ids(tiny: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = "In: What action should the robot take to put red ball on white plate?\nOut: "
    theirs = transformers.AutoTokenizer.from_pretrained(tiny)
    assert (
        theirs(text)["input_ids"]
        == Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(text).ids
    )
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (32000, 1, 2)
