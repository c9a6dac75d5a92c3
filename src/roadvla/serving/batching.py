"""Requests of many clients in one pass of the policy."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from roadvla.policy.base import Policy
from roadvla.policy.sampling import draw_uniform
from roadvla.serving.messages import MessageError, Request
from roadvla.types import Observation

Answer = dict[str, Any]


@dataclass(eq=False)
class _Job:
    request: Request
    answer: Future[Answer] = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def kind(self) -> tuple[object, ...]:
        """Jobs of one kind can share a pass."""
        return self.request.image.shape[1:], self.request.temperature


class Batcher:
    """One thread that runs the policy on whatever waits, several requests at a time.

    Args:
        policy: Used by this thread alone.
        device: Where it lives.
        max_rows: Most frames of a pass; a single request may have as many.
        max_wait: Seconds that a request may wait for others.
        max_waiting: Requests that may wait; more are refused.
        seed: Of the sampling, where a request does not bring its own numbers.
    """

    def __init__(
        self,
        policy: Policy,
        device: torch.device,
        *,
        max_rows: int,
        max_wait: float,
        max_waiting: int,
        seed: int = 0,
    ) -> None:
        self._policy, self._device = policy, device
        self.max_rows, self._max_wait = max_rows, max_wait
        self._waiting: queue.Queue[_Job | None] = queue.Queue(max_waiting)
        self._held: _Job | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._thread = threading.Thread(target=self._work, name="roadvla-policy", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Answer]:
        """Queue a request; give it up with ``cancel`` on what is returned.

        Raises:
            MessageError: If too many wait already.
        """
        job = _Job(request)
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise MessageError(
                f"busy: {self._waiting.maxsize} requests are waiting, ask again later"
            ) from None
        return job.answer

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            jobs, last = self._gather()
            jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if jobs:
                self._answer(jobs)
            if last:
                return

    def _gather(self) -> tuple[list[_Job], bool]:
        """Take the first job and what fits to it, as long as that may wait."""
        first, self._held = self._held or self._waiting.get(), None
        if first is None:
            return [], True
        jobs, rows = [first], len(first.request.image)
        until = first.arrived + self._max_wait
        while rows < self.max_rows:
            try:
                job = self._waiting.get(timeout=max(0.0, until - time.perf_counter()))
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            if job.kind != first.kind or rows + len(job.request.image) > self.max_rows:
                self._held = job
                break
            jobs.append(job)
            rows += len(job.request.image)
        return jobs, False

    def _answer(self, jobs: Sequence[_Job]) -> None:
        begun = time.perf_counter()
        try:
            answers = self._act([job.request for job in jobs])
        except Exception as error:  # whatever it is: the others must be answered
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
                return
            for job in jobs:  # alone, so that only who is to blame is told
                self._answer([job])
            return
        took = time.perf_counter() - begun
        for job, answer in zip(jobs, answers, strict=True):
            times = {"infer_ms": 1e3 * took, "wait_ms": 1e3 * (begun - job.arrived)}
            job.answer.set_result({**answer, "server_timing": times})

    def _act(self, requests: Sequence[Request]) -> list[Answer]:
        """Run one pass and cut its output."""
        policy, counts = self._policy, [len(request.image) for request in requests]
        image = torch.from_numpy(np.concatenate([request.image for request in requests]))
        prompts = [text for request in requests for text in request.prompts]
        uniform = torch.cat([self._uniform(request) for request in requests])
        output = policy.act(
            Observation(image=image.to(self._device), prompt=policy.tokenize(prompts)),
            temperature=requests[0].temperature,
            uniform=uniform.to(self._device),
        )
        columns = {
            "actions": policy.decode(output.action_tokens)[:, None],
            "action_tokens": output.action_tokens,
            "log_probs": output.log_probs,
            "value": output.value,
        }
        parts = {name: column.cpu().split(counts) for name, column in columns.items()}
        return [
            {
                name: (part[index][0] if request.single else part[index]).numpy()
                for name, part in parts.items()
            }
            for index, request in enumerate(requests)
        ]

    def _uniform(self, request: Request) -> torch.Tensor:
        if request.uniform is not None:
            return torch.tensor(request.uniform)
        return draw_uniform(len(request.image), self._policy.num_tokens, self._generator)
