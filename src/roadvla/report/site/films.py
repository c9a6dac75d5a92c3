"""Two methods on the same episode, side by side: a sprite sheet and a player that waits for you."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from roadvla.evaluation.evaluate import Film
from roadvla.evaluation.files import read_film
from roadvla.evaluation.results import Results, StudyRecord
from roadvla.report.site import html

_SIDE = 144
_EPISODES = 2


def players(results: Results, study: StudyRecord, methods: Sequence[str]) -> str:
    """One player per setting and episode, for the first seed that both methods were filmed with.

    They are the first episodes of each set, whatever became of them.
    """
    shown = []
    for setting in study.settings:
        for seed in study.seeds:
            films = []
            for method in methods:
                name = study.cells.get(method, {}).get(setting, {}).get(str(seed))
                path = results.films.get((name or "", setting))
                if path is not None:
                    films.append((method, read_film(path)))
            if len(films) == len(methods):
                shown += _of_setting(setting, seed, films)
                break
    return f'<div class="films">{"".join(shown)}</div>' if shown else ""


def _of_setting(setting: str, seed: int, films: list[tuple[str, Film]]) -> list[str]:
    count = min(_EPISODES, *(len(film.episode_ids) for _, film in films))
    made = []
    for place in range(count):
        if len({film.episode_ids[place] for _, film in films}) > 1:
            continue
        strips = "".join(_strip(method, film, place) for method, film in films)
        frames = min(film.frames.shape[1] for _, film in films)
        asked = films[0][1].instructions[place]
        title = f"{setting}, episode {films[0][1].episode_ids[place]}, seed {seed}: “{asked}”"
        ends = "; ".join(
            f"{method} {'succeeds' if bool(film.success[place]) else 'fails'}"
            for method, film in films
        )
        made.append(
            f'<figure class="film" data-frames="{frames}"><div class="strips">{strips}</div>'
            f'<div class="controls"><button type="button" class="play" aria-label="play">▶</button>'
            f'<input type="range" min="0" max="{frames - 1}" value="0" '
            f'aria-label="step of {html.text(title)}"><output>0</output></div>'
            f"<figcaption>{html.text(title)}. {html.text(ends)}.</figcaption></figure>"
        )
    return made


def _strip(method: str, film: Film, place: int) -> str:
    frames = film.frames[place].numpy()
    sheet = _png(np.concatenate(list(frames), axis=1))
    count, width = len(frames), _SIDE * len(frames)
    outcome = "success" if bool(film.success[place]) else "failure"
    return (
        f'<div class="strip"><div class="frame" role="img" '
        f'aria-label="{html.text(method)}, {count} frames, {outcome}" style="width:{_SIDE}px;'
        f"height:{_SIDE}px;background-image:url(data:image/png;base64,{sheet});"
        f'background-size:{width}px {_SIDE}px"></div>'
        f'<p>{html.text(method)} <span class="{outcome}">{outcome}</span></p></div>'
    )


def _png(frames: np.ndarray) -> str:
    """Palette of 128 colours: a third of the size, and no difference at this one."""
    image = Image.fromarray(frames).quantize(128)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
