"""Ranked lists as HTML: a page of their own, or a piece of another one."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from analysis.ranked_data import Group, Jpegs, Kind, Picture, Place, Query, RankedList, RankedLists, Run
from analysis.tables import data_line

_MARKS: dict[Kind, str] = {"hit": "✓", "miss": "✗", "ignored": "–"}  # noqa: RUF001 - the dash is meant

_PAGE = Template((Path(__file__).parent / "ranked_lists.html").read_text(encoding="utf-8"))
_STYLE = (Path(__file__).parent / "ranked_lists.css").read_text(encoding="utf-8")


def page(lists: RankedLists) -> str:
    """The whole page: images inlined, light or dark as the reader's system is, no other file, no network."""
    title = f"Ranked lists, unseen target {lists.target}"
    return _PAGE.substitute(title=escape(title), lists=fragment(lists))


def fragment(lists: RankedLists) -> str:
    """One `section` of class ranked-lists with its style, which touches nothing else. It takes light or dark from the
    `color-scheme` of the page around it."""
    facts = [("data", data_line(lists.data)), *lists.facts]
    return "\n".join(
        [
            '<section class="ranked-lists">',
            f"<style>\n{_STYLE}</style>",
            f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in facts)}</dl>",
            f"<ol>{''.join(map(_run, lists.runs))}</ol>",
            _key(lists),
            *(_group(group, lists.runs) for group in lists.groups),
            "</section>",
        ]
    )


def _run(run: Run) -> str:
    scores = f"mAP {100 * run.mAP:.1f}, Rank-1 {100 * run.rank1:.1f}"
    return f"<li><b>{escape(run.label)}</b>: {scores} <small>({escape(run.name)})</small></li>"


def _key(lists: RankedLists) -> str:
    """What frames, marks and maps mean."""
    words = {"hit": "the query's person", "miss": "somebody else", "ignored": "ignored: the query's person and camera"}
    marks = [f'<span class="mark {kind}">{_MARKS[kind]}</span> {words[kind]}' for kind in _MARKS]
    cameras = any(query.picture.camera is not None for group in lists.groups for query in group.queries)
    under = "its pid and camera" if cameras else "its pid"
    parts = [f"The first ranks of the gallery: {'; '.join(marks)}, no rank. Under each image {under}."]
    of_all = [one for group in lists.groups for query in group.queries for one in query.lists]
    if any(one.maps for one in of_all):
        parts.append(
            "Under the query and its hits, for methods that have such a map: where the network answers, the sum of "
            "squares over the channels of its last map, dark to bright within each map's own range; a letter names the "
            "path through the network."
        )
    return f'<p class="key">{" ".join(parts)}</p>'


def _group(group: Group, runs: Sequence[Run]) -> str:
    queries = "\n".join(_query(query, runs) for query in group.queries)
    return f'<h3>{escape(group.title)}</h3>\n<div class="queries">\n{queries}\n</div>'


def _query(query: Query, runs: Sequence[Run]) -> str:
    rows = []
    for run, found in zip(runs, query.lists, strict=True):
        change = 100 * (found.precision - query.lists[0].precision)
        more = "" if run is runs[0] else f" ({change:+.1f})"
        rows.append(
            f'<h4>{escape(run.label)}: <span class="ap">AP {100 * found.precision:.1f}{more}</span></h4>'
            f"<ul>{_asked(query.picture, found)}{''.join(map(_place, found.places))}</ul>"
        )
    return f"<article>{''.join(rows)}</article>"


def _asked(picture: Picture, found: RankedList) -> str:
    return _item("query", "query", f"query, {_who(picture)}", picture, found.maps)


def _place(place: Place) -> str:
    rank = "" if place.rank is None else f" {place.rank}"
    told = f"{place.kind}{'' if place.rank is None else f', rank {place.rank}'}, {_who(place.picture)}"
    return _item(place.kind, f"{_MARKS[place.kind]}{rank}", told, place.picture, place.maps)


def _item(style: str, head: str, told: str, picture: Picture, maps: Jpegs) -> str:
    """One image with its words, and its maps under it."""
    camera = "" if picture.camera is None else f"<span>c{picture.camera}</span>"
    under = "".join(_map(path, jpeg) for path, jpeg in maps.items())
    return (
        f'<li class="{style}" title="{escape(picture.file)}"><b>{head}</b>{_image(picture.jpeg, told)}'
        f"<span>{picture.pid}</span>{camera}{under}</li>"
    )


def _map(path: str, jpeg: bytes) -> str:
    letter = f"<figcaption>{escape(path)}</figcaption>" if path else ""
    return f"<figure>{_image(jpeg, f'activation map {path}'.strip())}{letter}</figure>"


def _who(picture: Picture) -> str:
    return f"pid {picture.pid}" + ("" if picture.camera is None else f", camera {picture.camera}")


def _image(jpeg: bytes, told: str) -> str:
    return f'<img alt="{escape(told)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
