"""Small pieces of HTML; everything that comes from a file is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape


def text(value: object) -> str:
    """Escape anything for use in text or in a quoted attribute."""
    return escape(str(value), quote=True)


def anchor(title: str) -> str:
    """Make an id of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def section(title: str, *parts: str, name: str | None = None) -> str:
    """A titled part of the page; empty if it has nothing to show."""
    body = "\n".join(part for part in parts if part)
    if not body:
        return ""
    key = text(name or anchor(title))
    return (
        f'<section id="{key}" aria-labelledby="{key}-title">\n'
        f'<h2 id="{key}-title">{text(title)}</h2>\n{body}\n</section>'
    )


def paragraph(sentence: str, kind: str = "") -> str:
    """One paragraph of plain text."""
    return f"<p{_class(kind)}>{text(sentence)}</p>" if sentence else ""


def listing(sentences: Iterable[str]) -> str:
    """A list of plain sentences; empty without one."""
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    sortable: bool = False,
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        caption: Says what it shows.
        head: Column titles, plain text.
        rows: Cells, already escaped; the first of a row is its heading.
        sortable: Whether a click on a title sorts by it.
        groups: Titles over several columns, with how many; plain text.
    """
    over = "".join(
        f'<th scope="colgroup" colspan="{span}">{text(title)}</th>' for title, span in groups
    )
    top = f"<tr>{over}</tr>" if over else ""
    titles = "".join(f'<th scope="col">{text(title)}</th>' for title in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">'
        f"<table{kind}><caption><span>{text(caption)}</span></caption><thead>{top}<tr>{titles}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, caption: str, described: str, files: Sequence[str] = ()) -> str:
    """A drawing with its caption, and what it says in words or numbers.

    Args:
        svg: As made by ``plots``.
        caption: Under it.
        described: For those who do not see it; HTML.
        files: The same as files, relative to the page.
    """
    links = " · ".join(
        f'<a href="{text(f)}">{text(f.rsplit(".", 1)[-1].upper())}</a>' for f in files
    )
    more = f' <span class="files">{links}</span>' if links else ""
    return (
        f'<figure><div class="scroll">{svg}</div><figcaption>{text(caption)}{more}</figcaption>'
        f"<details><summary>The numbers in words</summary>{described}</details></figure>"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
