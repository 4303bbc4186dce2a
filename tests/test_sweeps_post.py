"""A worker's post: what it says is in the study's folder, and it hears the word to stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.crew.post import Post, Stopped
from sweeps.study_folder import StudyFolder


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def post(tmp_path: Path, stop: threading.Event) -> Iterator[Post]:
    post = Post(StudyFolder(tmp_path), "w", 1, 3, stop)
    yield post
    post.leave()


def test_events_and_status(post: Post, capsys: pytest.CaptureFixture[str]) -> None:
    post.event("pruned", "trial-0001 pruned")
    ((event,), _) = post.folder.events()
    assert (event.kind, event.text, event.worker) == ("pruned", "trial-0001 pruned", "w")
    assert capsys.readouterr().err == "trial-0001 pruned\n"  # the log
    post.say(state="running", trial="trial-0001", epoch=0)
    post.say(epoch=1)  # too soon after the last
    (status,) = post.folder.statuses()
    assert (status["worker"], status["state"], status["epoch"]) == ("w", "running", 0)
    post.say(state="waiting for work")  # another state: at once, without what belonged to the last
    (status,) = post.folder.statuses()
    assert status["state"] == "waiting for work"
    assert "trial" not in status
    post.leave()
    assert post.folder.statuses() == []


def test_a_folder_that_cannot_be_written_ends_nothing(post: Post, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    (tmp_path / "workers" / "w.json").mkdir()
    post.event("unit", "done")
    post.say(state="running")
    (tmp_path / "workers" / "w.json").rmdir()


def test_the_word_to_stop(post: Post, stop: threading.Event) -> None:
    post.check()
    assert not post.stopped
    stop.set()
    assert post.wait(60)
    post.fence()  # the last thing an attempt does is told all the same
    with pytest.raises(Stopped):
        post.check()


def test_signs_of_life_while_an_attempt_runs(post: Post) -> None:
    beats = []
    with post.heartbeat(lambda: beats.append(1)):
        assert beats
        post.check()
    with post.heartbeat(None):  # a journal keeps none
        post.check()
