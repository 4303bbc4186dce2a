"""The saved view on W&B: its panels are of numbers that are logged, and it explains itself without an account."""

from __future__ import annotations

import importlib.util

import pytest
from glossary import explained, unexplained

from analysis.wandb_workspace import PANELS, main, workspace
from lda.errors import UsageError
from lda.tracking.child import _PLOTTED


def test_panels_show_what_is_logged() -> None:
    shown = [name for ends, curves in PANELS.values() for name in (*ends, *curves)]
    assert [name for name in unexplained(shown) if name != "val/score"] == []


def test_every_kind_of_number_in_the_glossary_has_the_step_for_its_axis() -> None:
    kinds = {name.partition("/")[0] for name in explained()} - {"test"}  # of the end of a run
    assert kinds == {pattern.partition("/")[0] for pattern in _PLOTTED}


def test_without_an_account_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["--entity", "me"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "`wandb login` first" in error


@pytest.mark.skipif(importlib.util.find_spec("wandb_workspaces") is not None, reason="wandb-workspaces is installed")
def test_without_the_package_it_says_how_to_get_it() -> None:
    with pytest.raises(UsageError, match=r"pip install .lda-reid\[workspace\]"):
        workspace("me", "lda-reid", "LDA")
