"""A data set of one's own: a CSV and ten lines of YAML are trained on and tested as they are, and each mistake is told
with its line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_data
import pytest
import trees

from analysis.study import print_name
from lda import evaluate, protocols, train
from lda.data import load_dataset
from lda.data.catalogue import NOT_STATED, facts, names, terms
from lda.data.doctor import main as doctor
from lda.data.own import VARIABLE
from lda.data.sources import build_task, evaluation_splits
from lda.errors import UsageError
from lda.runs import DataSet, Result

LINES = """path,pid,camid,split
a/1.png,1,0,train
a/2.png,1,1,train
a/3.png,2,0,train
a/4.png,2,1,train
b/5.png,7,0,query
b/6.png,7,1,gallery
b/7.png,8,1,query
b/8.png,8,0,gallery
b/9.png,0,0,gallery
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that LDA_DATASETS names."""
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def crossing(files: Path) -> Path:
    """A data set of nine images beside its files, which can be changed before it is first read."""
    for line in LINES.splitlines()[1:]:
        trees.image(files / "crossing" / line.split(",")[0])
    (files / "crossing.csv").write_text(LINES)
    own_data.describe(files, "crossing", "crossing")
    return files


# --- it is a data set like any other ---------------------------------------------------------------------------------
def test_its_name_works_wherever_one_does(crossing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names()[-1] == "crossing"
    assert print_name("crossing") == facts("crossing").title == "My crossing"
    dataset = load_dataset("crossing", crossing)
    assert [len(part) for part in (dataset.train, dataset.query, dataset.gallery)] == [4, 2, 3]
    assert (dataset.version, dataset.standin, dataset.distractor_pids) == ("1.0", False, {0})
    assert (dataset.query[0].path, dataset.query[0].pid) == (crossing / "crossing/b/5.png", 7)
    target = evaluation_splits("crossing", crossing)
    assert (target.kind, target.splits[0].camera_rule) == ("real", True)
    assert doctor(["--data-root", str(crossing), "--dataset", "crossing", "--verify"]) == 0
    assert "My crossing        ok        " in capsys.readouterr().out


def test_hashes_say_what_a_number_depends_on(crossing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path, bytes, person, camera, split and the camera rule; neither title nor where it lies."""

    def hashes(change: str = "", to: str = "", **described: str) -> tuple[str, str]:
        nonlocal count
        copy = tmp_path / f"copy-{(count := count + 1)}"
        shutil.copytree(crossing, copy)
        (copy / "crossing.csv").write_text(LINES.replace(change, to) if change else LINES)
        own_data.describe(copy, "crossing", "crossing", **described)
        monkeypatch.setenv(VARIABLE, str(copy))
        dataset = load_dataset("crossing", copy)
        return dataset.data_hash, dataset.test_hash

    count = 0
    first = hashes()
    assert first == hashes(title="Another", version="2", licence="none")
    trees.image(crossing / "crossing/a/10.png")
    changes = [("a/4.png,2", "a/10.png,2"), ("a/4.png,2", "a/4.png,1"), ("a/4.png,2,1", "a/4.png,2,2")]
    for change, to in changes:  # of training
        data, test = hashes(change, to)
        assert (data != first[0], test == first[1]) == (True, True)
    for change, to in (("png,0,0,gallery", "png,0,1,gallery"), ("b/9.png,0", "b/9.png,9")):
        data, test = hashes(change, to)
        assert (data != first[0], test != first[1]) == (True, True)
    assert hashes(cameras="false")[1] != first[1]
    shutil.copy(crossing / "crossing/a/1.png", crossing / "crossing/b/6.png")
    assert hashes()[1] != first[1]


def test_a_protocol_says_who_trains(crossing: Path, tiny_sets: Path) -> None:
    own_data.protocol(crossing, "mine", ["market1501", "crossing", "cuhk03"], ["crossing", "cuhk03"], "all")
    rules = protocols.get_protocol("mine")
    assert (rules.title, rules.source_part, rules.targets) == ("My mine", "all", ("crossing", "cuhk03"))
    assert rules.sources("crossing") == ("market1501", "cuhk03")  # nobody trains for itself
    task = build_task("mine", "cuhk03", tiny_sets)
    own = task.sources[1]
    assert (own.name, own.num_ids, len(own.records)) == ("crossing", 4, 8)  # nobody's box does not train
    assert task.content.kind == "stand-in"
    assert task.content.sources["crossing"] == load_dataset("crossing", tiny_sets).data_hash
    assert task.terms["crossing"] == ("CC0", "nobody, 2026")
    assert task.terms["cuhk03"].licence.startswith("MIT: drawn by this software")


def test_the_same_images_give_the_same_numbers_as_through_their_own_reader(
    files: Path, standin_tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    """Trained on and tested by the real commands: equal to the last bit."""
    sources = protocols.get_protocol("protocol3").sources("market1501")
    sets = [load_dataset(name, standin_tiny, msmt17_train="train+val") for name in (*sources, "market1501")]
    own = [own_data.copy_of(dataset, files, standin_tiny) for dataset in sets]
    own_data.protocol(files, "mine", own[:-1], own[-1:], "all")
    settings = ["method=baseline", "epochs=1", "steps_per_epoch=3", "warmup_epochs=0", "milestones=", "threads=1"]
    settings += ["wandb=disabled", "selection=oracle", "validation_fraction=0"]  # persons are held out by their set
    results = []
    for protocol, target in (("protocol3", "market1501"), ("mine", own[-1])):
        where = ["--data-root", str(standin_tiny), "--target", target]
        command = ["--protocol", protocol, "--output", str(tmp_path / protocol), "--set", *settings]
        assert train.main([*where, *command]) == 0, capsys.readouterr().err
        results.append(Result.read(tmp_path / protocol))
    theirs, mine = results
    assert (mine.mAP, mine.rank1, mine.mINP) == (theirs.mAP, theirs.rank1, theirs.mINP)
    assert mine.unit != theirs.unit
    assert mine.data == "stand-in"
    assert mine.data_sets[own[-1]] == DataSet("CC0", "nobody, 2026")
    older = json.loads((tmp_path / "mine/result.json").read_text())
    (tmp_path / "older").mkdir()
    (tmp_path / "older/result.json").write_text(json.dumps({k: v for k, v in older.items() if k != "data_sets"}))
    assert Result.read(tmp_path / "older") == replace(mine, data_sets={})
    capsys.readouterr()
    checkpoint = ["--checkpoint", str(tmp_path / "mine/checkpoint.pt"), "--data-root", str(standin_tiny)]
    for target in (own[-1], "market1501"):
        assert evaluate.main([*checkpoint, "--target", target]) == 0
        assert json.loads(capsys.readouterr().out)["mAP"] == pytest.approx(theirs.mAP, abs=1e-9)


def test_nobody_is_tested_on_what_trains(files: Path, standin_tiny: Path) -> None:
    """The same files under two names are the same images."""
    own = own_data.copy_of(load_dataset("market1501", standin_tiny), files, standin_tiny)
    own_data.protocol(files, "mine", [own, "msmt17"], ["market1501"], "all")
    with pytest.raises(
        UsageError, match=r"My my_market1501 trains on 96 image\(s\) that Market-1501 tests, e.g. .*jpg; an"
    ):
        build_task("mine", "market1501", standin_tiny)
    own_data.protocol(files, "mine", [own, "msmt17"], ["market1501"], "train")
    own_data.protocol(files, "other", ["msmt17", "cuhk03"], [own], "train")
    with pytest.raises(UsageError, match=r"Market-1501 selects by 102 image\(s\) that My my_market1501 tests"):
        build_task("other", own, standin_tiny, proxy="market1501")
    assert build_task("mine", "market1501", standin_tiny).sources[0].name == own


# --- mistakes in the table -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ("path,pid,camid,split", "path,pid,split", "crossing.csv:1: lacks the column camid; expected path,pid,camid,s"),
        ("a/2.png,1,1,train", "a/2.png,1,1,val", "crossing.csv:3: split: unknown split 'val'"),
        ("a/2.png,1,", "a/2.png,one,", "crossing.csv:3: pid: expected a whole number from 0 to 1000000000, got 'one'"),
        ("a/2.png,1,1", "a/2.png,1.0,1", "crossing.csv:3: pid: expected a whole number"),
        ("a/2.png,1,1", "a/2.png,1,-1", "crossing.csv:3: camid: expected a whole number from 0"),
        ("a/2.png", "a/none.png", "crossing.csv:3: path: there is no file "),
        ("a/2.png", "../a/2.png", "crossing.csv:3: path: expected a path below "),
        ("a/2.png", "/etc/passwd", "crossing.csv:3: path: expected a path below "),
        ("a/2.png", "./a/1.png", "crossing.csv:3: path: 1.png stands in line 2 already"),
        ("a/2.png,1,1,train", "a/2.png,1,1", "crossing.csv:3: expected 4 cells as in line 1, got 3"),
        ("a/2.png", '"a/2.png', "crossing.csv:10: not valid CSV: unexpected end of data"),
        ("7.png,8", "7.png,2", "crossing.csv:8: pid: person 2 is in query, and trains in line 4"),
        ("8.png,8", "8.png,9", "crossing.csv:8: pid: a query without a match, the gallery lacks person 8"),
        ("5.png,7", "5.png,0", "crossing.csv:6: pid: 0 is nobody, who can only be in the gallery; number persons"),
        ("query", "gallery", "crossing.csv:6: split: a gallery without any query (and 4 more line(s) alike)"),
        (",1,gallery", ",0,gallery", None),
        (LINES[21:], "", "crossing.csv:1: lists no image"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_table_is_one_line(crossing: Path, change: str, to: str, message: str | None) -> None:
    assert change in LINES
    (crossing / "crossing.csv").write_text(LINES.replace(change, to))
    if message is None:  # one query keeps its match
        with pytest.warns(UserWarning, match=r"1 query image\(s\) have matches in their own camera only"):
            load_dataset("crossing", crossing)
        return
    with pytest.raises(UsageError) as caught:
        load_dataset("crossing", crossing)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cameras_that_leave_no_query_are_told(crossing: Path) -> None:
    (crossing / "crossing.csv").write_text(LINES.replace(",0,", ",1,"))
    with pytest.raises(
        UsageError, match=r"crossing.csv:6: camid: no query has a match in another camera; where camera"
    ):
        load_dataset("crossing", crossing)


def test_a_table_or_folder_that_is_not_there_is_told(crossing: Path) -> None:
    (crossing / "crossing.csv").rename(crossing / "other.csv")
    with pytest.raises(UsageError, match=r"crossing\.csv: there is no such file; it lists the images of .*yaml:1"):
        load_dataset("crossing", crossing)
    (crossing / "crossing").rename(crossing / "elsewhere")
    with pytest.raises(UsageError, match=r"My crossing not found: there is no folder .*yaml:1 says where it is"):
        load_dataset("crossing", crossing)


# --- mistakes in the YAML --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        (
            "name: crossing",
            "name: viper",
            "crossing.yaml:1: name: 'viper' is a data set of lda/data/sets; choose anoth",
        ),
        ("name: crossing", "name: My Set", "crossing.yaml:1: name: expected small letters, digits and _"),
        ("name: crossing", "name: all", "crossing.yaml:1: name: expected small letters"),
        ("licence:", "license:", "crossing.yaml:3: unknown key 'license' (did you mean 'licence'?)"),
        ("citation: nobody, 2026\n", "", "crossing.yaml:1: lacks citation; see lda/data/own.py"),
        ("cameras: true", "cameras: yes", "crossing.yaml:6: cameras: expected true or false, got 'yes'"),
        ("title: My crossing", "title: [a, b]", "crossing.yaml:2: title: expected one line of text"),
        ("title: My crossing", "title: a\ntitle: b", "crossing.yaml:3: title: stands in line 2 already"),
        ("title: My crossing", "title: a: b", "crossing.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("root: crossing", "root: ~nobodyhere/x", "crossing.yaml:7: root: '~nobodyhere/x': no home folder is known"),
    ],
)
def test_a_mistake_in_the_yaml_is_one_line(crossing: Path, change: str, to: str, message: str) -> None:
    path = crossing / "crossing.yaml"
    assert change in path.read_text()
    path.write_text(path.read_text().replace(change, to))
    with pytest.raises(UsageError) as caught:
        names()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [crossing, viperr]", "mine.yaml:3: unknown data set 'viperr' (did you mean 'viper'?)"),
        ("sources: []", "mine.yaml:3: sources: expected a list of data sets"),
        ("sources: [crossing, crossing]", "mine.yaml:3: sources: expected names of data sets, each once"),
        ("sources: [viper]", "mine.yaml:4: targets: 'viper' is the only source; nobody else trains for it"),
        ("sources: [crossing]\nsource_part: test", "mine.yaml:4: source_part: unknown part 'test'"),
    ],
)
def test_a_mistake_in_a_protocol_is_one_line(crossing: Path, text: str, message: str, capsys: Any) -> None:
    (crossing / "mine.yaml").write_text(f"name: mine\ntitle: Mine\n{text}\ntargets: [viper]\n")
    assert train.main(["--protocol", "mine", "--target", "viper"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_names_are_anybodys_once(crossing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_data.protocol(crossing, "protocol3", ["crossing"], ["viper"])
    with pytest.raises(UsageError, match=r"protocol3.yaml:1: name: 'protocol3' stands in lda/protocols.py"):
        protocols.get_protocol("mine")
    shutil.copy(crossing / "crossing.yaml", crossing / "again.yaml")
    monkeypatch.setenv(VARIABLE, f"{crossing}/again.yaml:{crossing}")
    with pytest.raises(UsageError, match=r"crossing.yaml:1: name: 'crossing' is there already, in .*again.yaml:1"):
        names()
    monkeypatch.setenv(VARIABLE, str(crossing / "nowhere"))
    with pytest.raises(UsageError, match=r"LDA_DATASETS: .*nowhere' is not there; expected a YAML file or a folder"):
        names()


# --- licence and citation --------------------------------------------------------------------------------------------
def test_every_data_set_says_licence_and_citation() -> None:
    for name in names():
        licence, citation = terms(name, drawn=False)
        assert licence.isprintable()
        assert citation.isprintable()
        assert citation != NOT_STATED
        assert licence
        assert terms(name, drawn=True).citation == f"imitates: {citation}"
