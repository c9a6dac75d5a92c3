"""Speed of the ManiSkill suite: steps per second, where the time goes, and judging an episode.

    VK_ICD_FILENAMES=... MS_ASSET_DIR=... python benchmarks/bench_maniskill.py --output FILE

Judging is compared, turn and turn about in one run, with the straightforward way: every object of
the scene is asked whether the gripper holds it, in every environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from roadvla.envs.maniskill.env import ManiSkillEnv
from roadvla.envs.maniskill.options import ManiSkillSettings
from roadvla.evaluation.machine import describe_machine

STILL = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
MOVE = torch.tensor([[0.004, 0.0, -0.002, 0.0, 0.0, 0.01, 1.0]])


def environment(setting: str, processes: int, steps: int) -> dict[str, float]:
    """Steps per second of the vector environment, resets apart; one episode per process."""
    settings = ManiSkillSettings(stand_ins=True, processes=processes)
    begun = time.perf_counter()
    env = ManiSkillEnv(setting, split="train", num_envs=processes, settings=settings)
    made = time.perf_counter() - begun
    resets = []
    for first in range(0, 3 * processes, processes):
        begun = time.perf_counter()
        env.reset(torch.arange(first, first + processes))
        resets.append(time.perf_counter() - begun)
    action = MOVE.expand(processes, 7) * 0.2
    for _ in range(5):
        env.step(action)
    rates = []
    for _ in range(3):
        env.reset(torch.arange(processes))
        begun = time.perf_counter()
        for _ in range(steps):
            env.step(action)
        rates.append(processes * steps / (time.perf_counter() - begun))
    env.close()
    return {
        "steps_per_second": round(statistics.median(rates), 1),
        "slowest": round(min(rates), 1),
        "fastest": round(max(rates), 1),
        "seconds_to_make": round(made, 1),
        "seconds_to_reset": round(statistics.median(resets[1:]), 2),
    }


def crowded(steps: int) -> dict[str, float]:
    """One scene in this process with all 25 objects built, 480 by 640, and where its time goes."""
    from roadvla.envs.maniskill.scene import PutOnPlateScene

    scene = PutOnPlateScene(setting="Main-v3", build="all", obs_mode="none", stand_ins=True)
    split = parts(scene, steps)
    scene.close()
    return split


def parts(scene, steps: int) -> dict[str, float]:
    """Milliseconds per step of physics and control, drawing, and putting frames together."""
    scene.reset(seed=0, options={"episode_id": torch.tensor([1234])})
    scene.capture()
    took: dict[str, list[float]] = defaultdict(list)
    camera = scene._sensors["3rd_view_camera"]
    for _ in range(steps):
        begun = time.perf_counter()
        scene.step(MOVE * 0.2)
        stepped = time.perf_counter()
        scene.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera.capture()
        seen = camera.get_obs(depth=False, position=False)
        drawn = time.perf_counter()
        scene._frames.compose(seen["rgb"], seen["segmentation"][..., 0], scene._keep)
        took["physics_control_and_judging"].append(stepped - begun)
        took["drawing"].append(drawn - stepped)
        took["green_screen"].append(time.perf_counter() - drawn)
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in took.items()}
    total = sum(milliseconds.values())
    return {name: round(value, 2) for name, value in milliseconds.items()} | {
        "steps_per_second": round(1e3 / total, 1)
    }


def judging(count: int, rounds: int) -> dict[str, object]:
    """Time judging ``count`` scenes of 25 objects, ours against every object in turn."""
    from roadvla.envs.maniskill.scene import PutOnPlateScene

    make = partial(PutOnPlateScene, setting="Main-v3", build="all", shader=None, stand_ins=True)
    scenes = [make() for _ in range(count)]
    for index, scene in enumerate(scenes):
        scene.reset(seed=0, options={"episode_id": torch.tensor([1000 + 3137 * index])})
        scene.step(STILL)

    def straightforward() -> None:
        for scene in scenes:
            held = [scene.agent.is_grasping(body) for body in scene._objects]
            target = int(scene.episodes.object)
            force = scene.scene.get_pairwise_contact_forces(
                scene._objects[target], scene._receptacles[int(scene.episodes.receptacle)]
            )
            poses = [body.pose.raw_pose for body in (*scene._objects, *scene._receptacles)]
            assert len(held) == 25
            assert len(poses) == 26
            assert force.shape == (1, 3)

    def ours() -> None:
        for scene in scenes:
            scene._judge()

    ratios, theirs, own = [], [], []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        straightforward()
        middle = time.perf_counter()
        ours()
        theirs.append(1e3 * (middle - begun) / count)
        own.append(1e3 * (time.perf_counter() - middle) / count)
        ratios.append(theirs[-1] / own[-1])
    for scene in scenes:
        scene.close()
    return {
        "environments": count,
        "straightforward_ms": round(statistics.median(theirs[1:]), 3),
        "ours_ms": round(statistics.median(own[1:]), 3),
        "ratio": round(statistics.median(ratios[1:]), 1),
        "ratio_range": [round(min(ratios[1:]), 1), round(max(ratios[1:]), 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--environments", type=int, default=16)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "machine": describe_machine("cpu"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_at_start": round(os.getloadavg()[0], 2),
        "frames": "480x640, one_pass, PhysX on a processor",
    }
    result["default_setting_1_process"] = environment("Single-v1", 1, chosen.steps)
    result["default_setting_2_processes"] = environment("Single-v1", 2, chosen.steps)
    result["main_v3_1_process"] = environment("Main-v3", 1, chosen.steps)
    result["main_v3_2_processes"] = environment("Main-v3", 2, chosen.steps)
    result["main_v3_all_25_objects_in_the_scene"] = crowded(chosen.steps)
    result["judging"] = judging(chosen.environments, 10)
    text = json.dumps(result, indent=1)
    print(text)
    if chosen.output is not None:
        chosen.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
