"""A contact sheet: what a data set looks like, as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from lda.data.decode import open_rgb
from lda.data.records import ImageRecord, ReidDataset
from lda.data.survey import Count
from lda.errors import UsageError

PERSONS = 8
"""Persons shown of a data set."""

CAMERAS = 4
"""Images shown of a person, each of another camera where cameras are known."""

_THUMBNAIL = (128, 256)  # pixels at most, about twice what is seen: sharp on small screens, too
_QUALITY = 85


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page says of one data set.

    Attributes:
        title: in print, with the kind of its files where there are several.
        verdict: the doctor's, one word.
        facts: (name, value) lines.
        drawn: its images are the stand-in's.
        counts: part -> (counted, expected), as in `lda.data.survey.Survey`; `expected` says whose the latter are.
        findings: (word, text) lines.
        persons: see `persons`.
        cameras: whether camera numbers say anything.
    """

    title: str
    verdict: str
    facts: Sequence[tuple[str, str]]
    drawn: bool
    counts: Mapping[str, tuple[Count, Count | None]]
    expected: str
    findings: Sequence[tuple[str, str]]
    persons: Mapping[str, Sequence[ImageRecord]]
    cameras: bool


def persons(dataset: ReidDataset, cameras: bool) -> dict[str, list[ImageRecord]]:
    """Some persons, evenly among those with two cameras (two images, where cameras are unknown): name -> images."""
    test = {record.path: record for split in dataset.test_splits for record in (*split.query, *split.gallery)}
    found: dict[tuple[str, int], dict[object, ImageRecord]] = {}
    for part, records in (("train", dataset.train), ("test", test.values())):
        for record in sorted(records, key=lambda record: record.path):
            if record.pid not in dataset.distractor_pids:
                seen = found.setdefault((part, record.pid), {})
                seen.setdefault(record.camid if cameras else record.path, record)
    shown = {key: list(seen.values())[:CAMERAS] for key, seen in sorted(found.items()) if len(seen) > 1}
    keys = list(shown)
    chosen = [keys[place * len(keys) // PERSONS] for place in range(PERSONS)] if len(keys) > PERSONS else keys
    return {f"{pid}, {part}": sorted(shown[part, pid], key=lambda record: record.camid) for part, pid in chosen}


def page(title: str, sections: Sequence[Section], absent: Sequence[str]) -> str:
    """The page; `absent`: data sets that are not there."""
    missing = f'<p class="quiet">Not there: {escape(", ".join(absent))}.</p>' if absent else ""
    return _PAGE.substitute(title=escape(title), sections="\n".join(map(_section, sections)), absent=missing)


def _section(section: Section) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in section.facts)
    findings = "".join(f"<li><b>{escape(word)}</b> {escape(text)}</li>" for word, text in section.findings)
    drawn = '<p class="banner">Stand-in: drawn images, no real data set.</p>' if section.drawn else ""
    people = "".join(_person(name, images, section.cameras) for name, images in section.persons.items())
    return (
        f'<section><h2>{escape(section.title)} <span class="verdict {section.verdict}">{section.verdict}</span></h2>'
        f"{drawn}<dl>{facts}</dl>{_counts(section)}"
        f'{f"<ul>{findings}</ul>" if findings else ""}<div class="persons">{people}</div></section>'
    )


def _counts(section: Section) -> str:
    if not section.counts:
        return ""
    lines = []
    for part, (counted, wanted) in section.counts.items():
        cells = []
        for name in ("ids", "images", "cameras"):
            number, expected = getattr(counted, name), getattr(wanted, name, None)
            off = ' class="off"' if expected not in (None, number) else ""
            beside = "" if expected is None else f" <small>of {expected:,}</small>"
            cells.append(f"<td{off}>{_number(number)}{beside}</td>")
        lines.append(f'<tr><th scope="row">{escape(part)}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("part", "persons", "images", "cameras"))
    known = any(wanted is not None for _, wanted in section.counts.values())
    caption = f"Counted, of what is {escape(section.expected)}" if known else "Counted"
    return f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _person(name: str, images: Sequence[ImageRecord], cameras: bool) -> str:
    shots = "".join(_shot(name, record, cameras) for record in images)
    return f'<figure><div class="shots">{shots}</div><figcaption>person {escape(name)}</figcaption></figure>'


def _shot(name: str, record: ImageRecord, cameras: bool) -> str:
    camera = f"camera {record.camid}" if cameras else ""
    path, words = escape(str(record.path)), escape(f"person {name} {camera}".rstrip())
    try:
        picture = f'<img alt="{words}" title="{path}" src="data:image/jpeg;base64,{_thumbnail(record.path)}">'
    except UsageError as error:
        picture = f'<span class="damaged" title="{escape(str(error))}">damaged</span>'
    return f'<span class="shot">{picture}{f"<small>{camera}</small>" if camera else ""}</span>'


def _thumbnail(path: Path) -> str:
    image = open_rgb(path)
    image.thumbnail(_THUMBNAIL)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=_QUALITY)
    return base64.b64encode(content.getvalue()).decode()


_PAGE = Template((Path(__file__).parent / "contact_sheet.html").read_text(encoding="utf-8"))
