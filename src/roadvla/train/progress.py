"""What a person sees while a run goes on: a live bar, or a line now and then without a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LINES = 20
_SHOWN = (
    ("rollout/success_rate", "success", "{:.0%}"),
    ("policy/entropy", "entropy", "{:.2f}"),
    ("policy/kl", "KL", "{:.3f}"),
    ("loss/total", "loss", "{:.3f}"),
    ("policy/accuracy", "accuracy", "{:.2f}"),
    ("time/steps_per_second", "steps/s", "{:.0f}"),
    ("eval/train/success_rate", "ID", "{:.0%}"),
    ("eval/test/success_rate", "OOD", "{:.0%}"),
)


class Display:
    """Shows how far the work is and its latest numbers.

    Args:
        title: What is being done.
        total: Steps of the work.
        done: Steps already done.
        console: Where to write; standard error unless given.
    """

    def __init__(
        self, title: str, total: int, *, done: int = 0, console: Console | None = None
    ) -> None:
        self._title, self._total, self._done = title, total, done
        self._console = console or Console(stderr=True)
        self._latest: dict[str, float] = {}
        self._bar: Bar | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, numbers="")

    def __enter__(self) -> Display:
        """Start drawing."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing and leave the last numbers on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, metrics: Mapping[str, float], *, steps: int = 1) -> None:
        """Note finished steps and show their numbers.

        Args:
            metrics: By the names of ``docs/metrics.md``; those shown before stay until replaced.
            steps: Steps finished.
        """
        before, self._done = self._done, self._done + steps
        self._latest.update(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, numbers=self._numbers())
            return
        every = max(1, self._total // _LINES)
        if self._done // every > before // every or self._done == self._total:
            self._console.print(
                f"{self._title} {self._done}/{self._total}  {self._numbers()}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _numbers(self) -> str:
        shown = [
            f"{label} {form.format(self._latest[name])}"
            for name, label, form in _SHOWN
            if name in self._latest
        ]
        return " · ".join(shown)
