"""All that the recorded episodes say and no simulator is needed for, to the README's tolerances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ms_recorded import ASSETS, arrays, facts, groups, needs_assets, needs_episodes

from roadvla.envs.maniskill.episodes import Episodes, decode, encode, total
from roadvla.envs.maniskill.instructions import instructions
from roadvla.envs.maniskill.objects import OBJECTS, RECEPTACLES, half_sizes, read_boxes
from roadvla.envs.maniskill.overlays import opacity
from roadvla.envs.maniskill.poses import (
    ROBOT_POSE,
    SETTLE_SUBSTEPS,
    YAWS,
    spawn_poses,
    start_qpos,
    teleport_poses,
)
from roadvla.envs.maniskill.positions import positions
from roadvla.envs.maniskill.settings import Variant, variant
from roadvla.envs.maniskill.shifts import DistractorReceptacle, TextureShift, WholeImageShift

pytestmark = needs_episodes

EXTRAS = ("texture_index", "template_index", "qpos_offset_index")


def batches() -> list[tuple[Variant, str, list[dict[str, Any]], Episodes]]:
    found = []
    for env_id, obj_set, rows in groups():
        ids = torch.tensor([row["episode_id"] for row in rows])
        found.append((variant(env_id), obj_set, rows, decode(variant(env_id), obj_set, ids)))
    assert sum(len(rows) for _, _, rows, _ in found) == len(facts()["episodes"])
    return found


def recorded(name: str, rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(arrays()[name][[row["index"] for row in rows]])


def assert_poses(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, equal_nan=True)


def test_totals() -> None:
    for env_id, sets in facts()["totals"].items():
        assert {name: total(variant(env_id), name) for name in sets} == sets


def test_indices_and_names() -> None:
    for row, obj_set, rows, episodes in batches():
        others = RECEPTACLES if isinstance(row.shift, DistractorReceptacle) else OBJECTS
        for kind, models, index in (
            ("object", OBJECTS, episodes.object),
            ("receptacle", RECEPTACLES, episodes.receptacle),
            ("distractor", others, episodes.distractor),
        ):
            expected = [entry[kind] or {"index": -1} for entry in rows]
            assert index.tolist() == [body["index"] for body in expected], (row.env_id, kind)
            for body in expected:
                if body["index"] >= 0:
                    model = models[body["index"]]
                    assert (body["model"], body["name"]) == (model.folder, model.name)
        for name, index in (
            ("table_index", episodes.table),
            ("pos_index", episodes.position),
            ("yaw_index", episodes.yaw),
        ):
            assert index.tolist() == [entry[name] for entry in rows], (row.env_id, name)
        for name in EXTRAS:
            if name in rows[0]:
                assert episodes.extra.tolist() == [entry[name] for entry in rows]
        ids = encode(row, obj_set, episodes)
        assert ids.tolist() == [entry["episode_id_mod_total"] for entry in rows]
        assert {entry["total"] for entry in rows} == {total(row, obj_set)}


def test_weights_of_textures() -> None:
    for row, _, rows, episodes in batches():
        assert ("texture_mix" in rows[0]) == isinstance(row.shift, TextureShift | WholeImageShift)
        if isinstance(row.shift, TextureShift | WholeImageShift):
            expected = torch.tensor([entry["texture_mix"] for entry in rows])
            assert_poses(opacity(row.shift, episodes.extra), expected)


def test_instructions() -> None:
    for row, _, rows, episodes in batches():
        assert instructions(row, episodes) == [entry["instruction"] for entry in rows]


def test_counts() -> None:
    for row, _, rows, _ in batches():
        for entry in rows:
            assert entry["counts"] == {
                "objects_built": row.built_objects,
                "receptacles_built": row.built_receptacles,
                "positions": len(positions(row.layout)),
                "yaws": row.yaws.all.stop,
            }
            assert entry["settle_substeps"] == list(SETTLE_SUBSTEPS)
    assert len(YAWS) == 8


def test_spawn_poses() -> None:
    for row, _, rows, episodes in batches():
        assert_poses(spawn_poses(row, episodes), recorded("spawn", rows))


def test_teleport_poses() -> None:
    for row, obj_set, rows, episodes in batches():
        expected = recorded("teleport", rows)[:, 0]
        step = row.reposition_step(obj_set)
        assert [(entry["teleport"] or {"step": 0})["step"] for entry in rows] == [step] * len(rows)
        if not step:
            assert expected.isnan().all()
            continue
        assert_poses(teleport_poses(row, episodes), expected)
        assert {tuple(entry["teleport"]["settle_substeps"]) for entry in rows} == {
            SETTLE_SUBSTEPS[:1]
        }


def test_robot_poses() -> None:
    for row, _, rows, episodes in batches():
        base = torch.tensor([entry["robot_base_pose"] for entry in rows])
        assert_poses(torch.tensor(ROBOT_POSE).expand_as(base), base)
        qpos = start_qpos(row, episodes)
        assert_poses(qpos, recorded("qpos", rows)[:, 0])
        assert_poses(qpos, torch.tensor([entry["reset_qpos"] for entry in rows]))


@needs_assets
def test_half_sizes() -> None:
    boxes = [
        read_boxes(ASSETS / "more_carrot" / "model_db.json", OBJECTS),
        read_boxes(ASSETS / "more_plate" / "model_db.json", RECEPTACLES),
    ]
    for _, _, rows, episodes in batches():
        settled, expected = recorded("settled", rows), recorded("obj_rec_half_sizes", rows)
        for slot, index in enumerate((episodes.object, episodes.receptacle)):
            found = half_sizes(boxes[slot], index, settled[:, slot, 3:])
            torch.testing.assert_close(found, expected[:, slot], atol=1e-6, rtol=0)


def test_grasp_episodes() -> None:
    for grasp in facts()["grasps"]:
        row = variant(grasp["env_id"])
        episodes = decode(row, grasp["obj_set"], torch.tensor([grasp["episode_id"]]))
        assert instructions(row, episodes) == [grasp["instruction"]]
        assert episodes.position.item() == grasp["pos_index"]
        assert episodes.object.item() == grasp["object"]["index"]
        spawn = torch.from_numpy(np.asarray(arrays()[f"grasp_{grasp['k']}_spawn"]))[None]
        assert_poses(spawn_poses(row, episodes), spawn)
