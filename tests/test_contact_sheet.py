"""The doctor's contact sheet: one page that needs nothing else, whatever the data sets are called and hold."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import own_data
import pytest
import trees

from lda.data import load_dataset
from lda.data.contact_sheet import CAMERAS, PERSONS, persons
from lda.data.doctor import main
from lda.data.own import VARIABLE


class Page(HTMLParser):
    """Its words, its sections and its figures' pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.figures: list[list[str]] = []
        self.words = ""
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.add(tag)
        if tag == "section":
            self.sections.append("")
        if tag == "figure":
            self.figures.append([])
        if tag == "img":
            self.figures[-1].append(str(known["src"]))

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.sections:
            self.sections[-1] = " ".join(f"{self.sections[-1]} {data}".split())


@pytest.fixture
def root(tiny_sets: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sets, tmp_path / "data"))


def test_a_page_shows_persons_counts_and_terms(root: Path, tmp_path: Path) -> None:
    assert main(["--data-root", str(root), "--show", str(tmp_path / "made/sheet.html")]) == 0
    text = (tmp_path / "made/sheet.html").read_text()
    page = Page(text)
    assert "Not there: PRID2011, GRID, VIPeR, i-LIDS." in page.words
    market = page.sections[0]
    assert market.startswith("Market-1501 ok Stand-in: drawn images, no real data set.")
    for words in (
        "version v15.09.15",
        "licence MIT: drawn by",
        "citation imitates: Zheng et al., Scalable",
        "24 of 24",
    ):
        assert words in market
    assert "person 2, train" in market
    assert len(page.figures) == sum(section.count("person ") for section in page.sections)
    for pictures in page.figures:
        assert 2 <= len(pictures) <= CAMERAS
        assert all(source.startswith("data:image/jpeg;base64,/9j/") for source in pictures)
    assert not page.tags & {"script", "link", "iframe"}
    assert "http" not in text


def test_what_is_wrong_is_on_the_page_and_escaped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setenv(VARIABLE, str(files))
    for line in ("a&b.png", "<i>.png"):
        trees.image(files / line)
    (files / "mine.csv").write_text("path,pid,camid,split\na&b.png,1,0,train\n<i>.png,1,1,train\n")
    own_data.describe(files, "mine", "", title="<script>alert(1)</script>", licence='a"><b>')
    (root / "Market-1501-v15.09.15/bounding_box_test/0001_c2s2_000060_01.jpg").write_bytes(b"no image")
    (root / "Market-1501-v15.09.15/query/0003_c2s1_000050_00.jpg").unlink()
    assert main(["--data-root", str(root), "--show", str(tmp_path / "sheet.html")]) == 1
    page = Page((tmp_path / "sheet.html").read_text())
    assert "script" not in page.tags
    assert "damaged" in page.sections[0]
    assert "error Market-1501 query: found 3 ids, 5 images, expected 3 ids, 6 images" in page.sections[0].replace(
        "  ", " "
    )
    mine = page.sections[-1]
    assert mine.startswith("<script>alert(1)</script> ok place")
    assert 'licence a"><b> citation' in mine
    assert "Counted part" in mine
    assert "error: Market-1501 query" in capsys.readouterr().out


def test_persons_are_spread_and_seen_twice(standin_tiny: Path) -> None:
    viper = load_dataset("viper", standin_tiny)
    shown = persons(viper, cameras=True)
    assert len(shown) == PERSONS
    numbers = [int(name.split(",")[0]) for name in shown]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 400  # not the first eight
    assert all([record.camid for record in images] == [0, 1] for images in shown.values())
    market = persons(load_dataset("market1501", standin_tiny), cameras=True)
    assert not [name for name in market if name.startswith("0,")]
    assert all(len({record.camid for record in images}) == len(images) >= 2 for images in market.values())
    unknown = persons(load_dataset("cuhk_sysu", standin_tiny), cameras=False)
    assert all(len({record.path for record in images}) == len(images) >= 2 for images in unknown.values())
