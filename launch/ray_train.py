r"""One run on the GPUs of a Ray cluster: one process per GPU, wherever Ray finds them.

    python launch/ray_train.py --processes 16 -- rl4vla --env VR-UnseenTable --device cuda \
        --output /shared/runs/7b

What follows the dashes goes to `roadvla train`; the output folder must be on a disk that all nodes
see. Ray only starts the processes: they talk through torch.distributed. If one fails, all are
started again and go on from the last checkpoint. (Grids of many runs: `roadvla study --executor
ray`.)
"""

from __future__ import annotations

import argparse
import os
import socket
import sys

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(max_restarts=0)
class Process:
    """One process of the run."""

    def address(self) -> tuple[str, str]:
        """Where the others can meet this one."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), str(listener.getsockname()[1])

    def train(self, variables: dict[str, str], arguments: list[str]) -> int:
        """Take part in the run; gives the exit code."""
        os.environ.update(variables)
        from roadvla.cli import main

        return main(["train", *arguments, "--resume-if-begun"])


def run_once(processes: int, gpus: float, arguments: list[str]) -> int:
    """Start all processes and wait for the first that fails, or all."""
    bundles = [{"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}] * processes
    group = placement_group(bundles, strategy="PACK")
    ray.get(group.ready())
    members = []
    try:
        for rank in range(processes):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = Process.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=where)
            members.append(options.remote())
        host, port = ray.get(members[0].address.remote())
        common = {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        # Ray shows each process its own GPU only, so its local number is 0.
        waiting = [
            member.train.remote({**common, "RANK": str(rank), "LOCAL_RANK": "0"}, arguments)
            for rank, member in enumerate(members)
        ]
        while waiting:
            done, waiting = ray.wait(waiting)
            try:
                code = ray.get(done[0])
            except RayActorError:
                code = 1
            if code:
                return code
        return 0
    finally:
        for member in members:
            ray.kill(member)
        remove_placement_group(group)


def main() -> int:
    """Read the flags and run, again if a process fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--gpus-per-process", type=float, default=1.0)
    parser.add_argument("--max-restarts", type=int, default=3)
    parser.add_argument("arguments", nargs="+", help="for roadvla train, after --")
    asked = parser.parse_args()
    ray.init(log_to_driver=True)
    for attempt in range(asked.max_restarts + 1):
        code = run_once(asked.processes, asked.gpus_per_process, asked.arguments)
        if code != 1:  # 1: a process failed; anything else is success, a mistake or a request
            return code
        print(f"a process failed, attempt {attempt + 1}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
