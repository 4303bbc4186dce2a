"""Data sets are files: what the ten say of themselves, and that one more file is all an eleventh needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trees

import lda.data.sets
from analysis.house_style import colour, marker
from analysis.study import print_name
from lda.data import DataOptions, load_dataset
from lda.data.catalogue import facts, find, names, title
from lda.data.doctor import main
from lda.data.sources import build_task, evaluation_splits
from lda.errors import UsageError
from lda.protocols import PROTOCOLS, Protocol
from lda.settings import settings_of

TITLES = {
    "market1501": "Market-1501",
    "msmt17": "MSMT17",
    "cuhk_sysu": "CUHK-SYSU",
    "cuhk02": "CUHK02",
    "cuhk03": "CUHK03",
    "prid": "PRID2011",
    "grid": "GRID",
    "viper": "VIPeR",
    "ilids": "i-LIDS",
    "dukemtmcreid": "DukeMTMC-reID",
}

ELEVENTH = '''
"""A data set of a user."""

from lda.data.catalogue import Facts
from lda.data.records import Split
from lda.data.survey import Count, Grammar, Layout

FACTS = Facts(title="My Crossing", single_shot=True)
NAMES = Grammar(r"(?P<pid>\\d+)_c(?P<camera>\\d)", extension=".png", example="1_c1.png")
LAYOUT = Layout("my crossing", ("my_crossing",), ("images",), NAMES, "images")

def read(survey, options):
    found = survey.locate(LAYOUT)
    if found is None:
        return None
    records = survey.records(found.part("images"), NAMES, cameras=2)
    survey.check_count("images", records, Count(5, 10, 2))
    query, gallery = ([record for record in records if record.camid == camid] for camid in (0, 1))
    return survey.dataset("1.0", splits=[Split(tuple(query), tuple(gallery))])
'''


@pytest.fixture
def eleventh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data root with an eleventh data set, whose file is among the others."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a_crossing.py").write_text(ELEVENTH)
    monkeypatch.setattr(lda.data.sets, "__path__", [*lda.data.sets.__path__, str(tmp_path / "files")])
    for pid in range(5):
        for camera in (1, 2):
            trees.image(tmp_path / f"data/my_crossing/images/{pid}_c{camera}.png")
    yield tmp_path / "data"
    sys.modules.pop("lda.data.sets.a_crossing", None)


def test_names_titles_and_order_of_the_ten() -> None:
    assert {name: title(name) for name in names()} == TITLES
    assert names() == tuple(TITLES)
    assert title("my_own_set") == "my_own_set"
    assert [name for name in names() if not facts(name).cameras] == ["cuhk_sysu"]
    assert [name for name in names() if facts(name).single_shot] == ["prid", "grid", "viper", "ilids"]
    assert [name for name in names() if facts(name).withdrawn] == ["dukemtmcreid"]
    assert {name for rules in PROTOCOLS.values() for name in rules.targets} <= set(names())


def test_every_file_is_a_data_set() -> None:
    files = {path.stem for path in Path(lda.data.sets.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(TITLES)


@pytest.mark.parametrize("name", TITLES)
def test_a_data_set_states_the_options_that_it_reads(name: str) -> None:
    tree = ast.parse(Path(str(sys.modules[find(name).__name__].__file__)).read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "options"
    }
    assert used == set(facts(name).options) <= set(settings_of(DataOptions))


def test_an_eleventh_is_one_more_file(eleventh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names() == (*TITLES, "a_crossing")  # last, whatever its name
    assert title("a_crossing") == print_name("a_crossing") == "My Crossing"
    dataset = load_dataset("a_crossing", eleventh)
    assert (len(dataset.query), len(dataset.gallery), dataset.version) == (5, 5, "1.0")
    target = evaluation_splits("a_crossing", eleventh)
    assert target.kind == "real"
    assert target.splits[0].single_shot
    assert main(["--data-root", str(eleventh)]) == 0
    assert "My Crossing" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"unknown data set 'crossing' \(did you mean 'a_crossing'\?\)"):
        load_dataset("crossing", eleventh)


def test_an_eleventh_can_be_a_target(eleventh: Path, tiny_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in tiny_sets.iterdir():
        (eleventh / path.name).symlink_to(path)
    (eleventh / "STANDIN.json").unlink()
    rules = Protocol("own", "own", "train", {"a_crossing": ("market1501", "cuhk03")})
    monkeypatch.setitem(PROTOCOLS, "own", rules)
    task = build_task("own", "a_crossing", eleventh, validation_fraction=0.1)
    assert len(task.test_splits[0].query) == 5
    assert task.content.kind == "stand-in"  # of its sources, which are links into one
    assert task.content.target == evaluation_splits("a_crossing", eleventh).content


def test_an_eleventh_has_a_look_of_its_own(eleventh: Path) -> None:
    before = {name: (colour(name, 0), marker(name, 0)) for name in TITLES}
    assert [look[1] for look in before.values()] == ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*"]
    assert len({look[0] for look in before.values()}) == 10
    assert colour("a_crossing", 0) not in {look[0] for look in before.values()}
    assert marker("a_crossing", 0) not in {look[1] for look in before.values()}
    assert (colour("unknown", 2), marker("unknown", 2)) == before["cuhk_sysu"]
    looks = {(colour("unknown", place), marker("unknown", place)) for place in range(20)}
    assert len(looks) == 20


def test_a_file_that_is_no_data_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_of_sets.py").write_text("VALUE = 1\n")
    monkeypatch.setattr(lda.data.sets, "__path__", [*lda.data.sets.__path__, str(tmp_path)])
    with pytest.raises(UsageError, match=r"helper_of_sets\.py: a data set's file needs FACTS"):
        names()
    del sys.modules["lda.data.sets.helper_of_sets"]


def test_the_catalogue_loads_no_heavy_library() -> None:
    heavy = ("torch", "scipy", "h5py", "PIL", "pandas")
    code = f"import sys; from lda.data.catalogue import names; names(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_keywords_and_options_are_the_same(tiny_sets: Path) -> None:
    by_keyword = load_dataset("cuhk03", tiny_sets, cuhk03_boxes="detected")
    assert by_keyword == load_dataset("cuhk03", tiny_sets, DataOptions(cuhk03_boxes="detected"))
    assert by_keyword.version == "detected"
    with pytest.raises(TypeError, match="cuhk03_box"):
        load_dataset("cuhk03", tiny_sets, cuhk03_box="detected")
