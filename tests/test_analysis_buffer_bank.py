"""analysis.bank_numbers and analysis.buffer_bank: statistics against loops, figures by their artists."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from study_files import LAYERS, write_bank, write_study, write_trial, write_unit

from analysis import buffer_bank
from analysis.bank_numbers import (
    Bank,
    channel_curves,
    choose_layers,
    closest_pairs,
    domain_distances,
    layer_distances,
    read_bank,
)
from analysis.buffer_bank import bank_figure, distance_figure, draw_curves, draw_distances, open_source
from analysis.house_style import new_figure, save
from lda.errors import UsageError

ROOT = Path(__file__).parent.parent
DOMAINS = ("market1501", "cuhk02", "cuhk03", "cuhk_sysu")


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    write_bank(tmp_path / "bank.npz", DOMAINS)
    return read_bank(tmp_path / "bank.npz")


def test_reading_keeps_order_and_takes_the_root_of_variances(tmp_path: Path, bank: Bank) -> None:
    assert bank.domains == DOMAINS
    assert bank.unseen == ()
    assert bank.layers == list(LAYERS)
    with np.load(tmp_path / "bank.npz") as file:
        for layer, channels in LAYERS.items():
            assert bank.mean[layer].shape == bank.std[layer].shape == (4, channels)
            np.testing.assert_allclose(bank.std[layer] ** 2, file[f"var/{layer}"], rtol=1e-6)


def test_a_domain_never_seen_is_left_out(tmp_path: Path) -> None:
    write_bank(tmp_path / "bank.npz", DOMAINS, unseen=("cuhk02",))
    bank = read_bank(tmp_path / "bank.npz")
    assert bank.domains == ("market1501", "cuhk03", "cuhk_sysu")
    assert bank.unseen == ("cuhk02",)
    assert bank.mean["bn1"].shape == (3, 32)
    write_bank(tmp_path / "bank.npz", DOMAINS, unseen=DOMAINS)
    with pytest.raises(UsageError, match="no domain was seen in training"):
        read_bank(tmp_path / "bank.npz")


def test_a_file_that_is_no_bank_is_named(tmp_path: Path) -> None:
    path = tmp_path / "buffer_bank.npz"
    for content in (b"", b"no zip", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"buffer_bank\.npz: expected a Buffer Bank"):
            read_bank(path)
    np.savez(path, domains=np.array(DOMAINS))
    with pytest.raises(UsageError, match="layers"):
        read_bank(path)
    with pytest.raises(UsageError, match="No such file"):
        read_bank(tmp_path / "nothing.npz")


def test_distances_against_a_loop(bank: Bank) -> None:
    by_layer = layer_distances(bank)
    for index, layer in enumerate(bank.layers):
        for a in range(4):
            for b in range(4):
                total = 0.0
                for channel in range(LAYERS[layer]):
                    total += (bank.mean[layer][a, channel] - bank.mean[layer][b, channel]) ** 2
                    total += (bank.std[layer][a, channel] - bank.std[layer][b, channel]) ** 2
                assert by_layer[index, a, b] == pytest.approx(math.sqrt(total) / math.sqrt(LAYERS[layer]))
    distances = domain_distances(bank)
    np.testing.assert_allclose(distances.to_numpy(), by_layer.mean(axis=0))
    assert list(distances.index) == list(distances.columns) == list(DOMAINS)
    np.testing.assert_array_equal(distances.to_numpy(), distances.to_numpy().T)
    assert (np.diag(distances) == 0).all()


def test_closest_pair_is_the_shared_scene(bank: Bank) -> None:
    pairs = closest_pairs(domain_distances(bank))
    assert len(pairs) == 6
    assert pairs[0][:2] == ("cuhk02", "cuhk03")
    assert [pair[2] for pair in pairs] == sorted(pair[2] for pair in pairs)


def test_layers_to_draw(bank: Bank) -> None:
    assert choose_layers(bank) == ["bn1", "layer3.0.bn1", "output"]
    assert choose_layers(bank, ["output", "bn1"]) == ["output", "bn1"]
    with pytest.raises(UsageError, match=r"--layers: unknown layer 'layer1.bn1' \(did you mean 'layer1.0.bn1'\?\)"):
        choose_layers(bank, ["layer1.bn1"])
    shortcut = Bank(("a",), (), {"layer1.downsample.1": np.zeros((1, 2)), "bn": np.zeros((1, 2))}, {})
    assert choose_layers(shortcut) == ["bn"]


def test_curves_hold_the_bank_and_rise_on_average(bank: Bank) -> None:
    curves = channel_curves(bank, ["bn1", "output"], channels=10)
    assert len(curves) == 2 * 2 * 4 * 10
    for row in curves.sample(50, random_state=0).itertuples():
        rows = (bank.mean if row.statistic == "mean" else bank.std)[row.layer]
        assert row.value == rows[DOMAINS.index(row.domain), row.channel]
    for _, panel in curves.groupby(["layer", "statistic"]):
        average = panel.groupby("position")["value"].mean()
        assert average.index.tolist() == list(range(10))
        assert average.is_monotonic_increasing


def test_curves_show_the_channels_with_the_largest_share_of_the_distances(bank: Bank) -> None:
    shares = np.zeros(256)
    for a in range(4):
        for b in range(4):
            shares += (bank.mean["output"][a] - bank.mean["output"][b]) ** 2
            shares += (bank.std["output"][a] - bank.std["output"][b]) ** 2
    curves = channel_curves(bank, ["output"], channels=20)
    assert set(curves["channel"]) == set(np.argsort(-shares)[:20])
    assert len(channel_curves(bank, ["bn1"], channels=1000)) == 2 * 4 * 32


def test_relative_curves_are_centred_and_in_standard_deviations(bank: Bank) -> None:
    curves = channel_curves(bank, ["bn1"], channels=32, relative=True)
    assert curves.groupby(["statistic", "channel"])["value"].mean().abs().max() < 1e-12
    row = curves[(curves["statistic"] == "mean") & (curves["domain"] == "cuhk03") & (curves["channel"] == 5)].iloc[0]
    mean, std = bank.mean["bn1"][:, 5], bank.std["bn1"][:, 5]
    assert row["value"] == pytest.approx((mean[2] - mean.mean()) / std.mean())
    plain = channel_curves(bank, ["bn1"], channels=32)
    assert curves["position"].tolist() == plain["position"].tolist()


def one_axes() -> Axes:
    axes = new_figure(1, 1, 4, 3)[1][0, 0]
    assert isinstance(axes, Axes)
    return axes


def test_lines_show_each_domain_under_its_printed_name(bank: Bank) -> None:
    curves = channel_curves(bank, ["bn1"], channels=12)
    axes = one_axes()
    panel = curves[curves["statistic"] == "mean"]
    assert draw_curves(axes, panel) is axes
    assert [line.get_label() for line in axes.lines] == ["Market-1501", "CUHK02", "CUHK03", "CUHK-SYSU"]
    for domain, line in zip(DOMAINS, axes.lines, strict=True):
        values = panel[panel["domain"] == domain].sort_values("position")["value"]
        np.testing.assert_array_equal(np.asarray(line.get_ydata()), values)
    looks = {(to_rgb(line.get_color()), line.get_marker()) for line in axes.lines}
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 4


def test_a_domain_keeps_its_colour_whatever_it_is_drawn_with(tmp_path: Path, bank: Bank) -> None:
    write_bank(tmp_path / "other.npz", ("cuhk_sysu", "cuhk03"))
    colours = []
    for source in (bank, read_bank(tmp_path / "other.npz")):
        axes = draw_curves(one_axes(), channel_curves(source, ["bn1"]).query("statistic == 'mean'"))
        colours.append({line.get_label(): line.get_color() for line in axes.lines})
    assert colours[1]["CUHK03"] == colours[0]["CUHK03"]
    assert colours[1]["CUHK-SYSU"] == colours[0]["CUHK-SYSU"]


def texts(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_the_figure_names_layers_statistics_and_domains(bank: Bank) -> None:
    figure = bank_figure(bank, ["bn1", "output"], "study x (stand-in data)", channels=32)
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes[:2]] == ["bn1, 32 of 32 channels", "output, 32 of 256 channels"]
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["mean", "standard deviation"]
    assert all(len(axes.lines) == 4 for axes in figure.axes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Market-1501", "CUHK02", "CUHK03", "CUHK-SYSU"]
    assert "stand-in" in texts(figure)


def test_no_label_lies_on_another(bank: Bank) -> None:
    title = "Buffer Bank, study protocol1, trial-0003, unseen target PRID2011 (stand-in data)"
    figure = bank_figure(bank, ["bn1", "layer3.0.bn1", "output"], title)
    figure.canvas.draw()
    labels = [label for axes in figure.axes for label in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    labels += [figure.findobj(lambda artist: getattr(artist, "get_text", str)() == title)[0], *figure.legends]
    boxes = [label.get_window_extent() for label in labels if getattr(label, "get_text", lambda: "legend")()]
    assert len(boxes) == 3 + 1 + 2 + 2
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_the_heat_map_shows_every_distance_and_frames_the_closest_pair(bank: Bank) -> None:
    distances = domain_distances(bank)
    axes = one_axes()
    assert draw_distances(axes, distances) is axes
    shown = sorted(text.get_text() for text in axes.texts)
    assert shown == sorted(f"{value:.3f}" for value in distances.to_numpy()[~np.eye(4, dtype=bool)])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["Market-1501", "CUHK02", "CUHK03", "CUHK-SYSU"]
    frames = {patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle)}
    assert frames == {(1, 2), (2, 1)}
    figure = distance_figure(distances, "a title")
    assert "closest: CUHK02 and CUHK03, 0.0" in texts(figure)


def test_the_default_unit_is_the_best_trials_first_target(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", scores=(0.5, 0.4, 0.6))
    source = open_source(folder)
    assert source.unit == folder / "trial-0002" / "cuhk03-s0"
    assert source.title == "study study, trial-0002, unseen target CUHK03 (stand-in data)"
    assert open_source(folder, "trial-0001/msmt17-s0").unit == folder / "trial-0001" / "msmt17-s0"
    with pytest.raises(
        UsageError, match=r"unknown unit 'trial-0001/msmt-s0' \(did you mean 'trial-0001/msmt17-s0'\?\)"
    ):
        open_source(folder, "trial-0001/msmt-s0")
    run = open_source(source.unit)
    assert run.title == "run cuhk03-s0, unseen target CUHK03 (stand-in data)"
    with pytest.raises(UsageError, match="is a single run already"):
        open_source(source.unit, "cuhk03-s0")


def test_the_default_unit_while_nothing_is_complete(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", scores=())
    with pytest.raises(UsageError, match=r"holds no buffer_bank\.npz yet"):
        open_source(folder)
    for number in (1, 0):
        write_unit(folder / f"trial-{number:04d}" / "msmt17-s0", "msmt17")
        write_trial(folder / f"trial-{number:04d}", number, None, ["msmt17-s0"], state="running")
    assert open_source(folder).unit == folder / "trial-0000" / "msmt17-s0"


def test_a_run_without_a_bank_is_explained(tmp_path: Path) -> None:
    write_unit(tmp_path / "baseline", "msmt17", method="baseline")
    with pytest.raises(UsageError, match=r"holds no buffer_bank\.npz: this run's method keeps no bank"):
        open_source(tmp_path / "baseline")
    write_unit(tmp_path / "running", "msmt17", finished=False)
    with pytest.raises(UsageError, match="the run is not finished"):
        open_source(tmp_path / "running")
    write_bank(tmp_path / "running" / "buffer_bank.npz", DOMAINS)
    assert "data unknown" in open_source(tmp_path / "running").title


def test_any_method_may_keep_a_bank(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", method="meta", bank=True, scores=(0.5, 0.6))
    assert open_source(folder).unit == folder / "trial-0001" / "cuhk03-s0"
    assert open_source(folder / "trial-0000" / "msmt17-s0").bank.layers == list(LAYERS)


def test_a_study_without_banks_is_explained(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", method="baseline", confirm_seeds=(1,))
    with pytest.raises(UsageError, match=r"holds no buffer_bank\.npz: a run of plain BN keeps no bank"):
        open_source(folder)
    for path in folder.glob("trial-*/*/result.json"):
        path.unlink()
    with pytest.raises(UsageError, match=r"holds no buffer_bank\.npz yet"):
        open_source(folder)


def test_the_command_writes_figures_and_numbers(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "protocol1", protocol="protocol1", scores=(0.5,))
    command = [sys.executable, "analysis/buffer_bank.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "unseen target PRID2011 (stand-in data)" in done.stdout
    assert "CUHK02 - CUHK03" in done.stdout.splitlines()[2]
    names = ["buffer_bank.png", "buffer_bank.pdf", "buffer_bank.csv"]
    names += ["buffer_bank_distances.png", "buffer_bank_distances.pdf", "buffer_bank_distances.csv"]
    names += ["buffer_bank_pairs.png", "buffer_bank_pairs.pdf", "buffer_bank_pairs.csv"]
    assert done.stdout.splitlines()[-9:] == [str(folder / name) for name in names]
    assert (folder / "buffer_bank.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "buffer_bank.pdf").read_bytes().startswith(b"%PDF")
    bank = read_bank(folder / "trial-0000" / "prid-s0" / "buffer_bank.npz")
    written = pd.read_csv(folder / "buffer_bank_distances.csv", index_col="domain")
    np.testing.assert_allclose(written, domain_distances(bank), rtol=1e-5)
    numbers = pd.read_csv(folder / "buffer_bank.csv").set_index(["layer", "domain", "channel"])
    assert len(numbers) == 4 * sum(LAYERS.values())
    assert numbers.loc[("output", "cuhk03", 7), "mean"] == pytest.approx(bank.mean["output"][2, 7], rel=1e-5)


def test_the_same_bank_gives_the_same_files(tmp_path: Path, bank: Bank) -> None:
    for kind in ("png", "pdf"):
        files = [
            save(bank_figure(bank, ["bn1"], "title", relative=True), tmp_path / str(attempt) / f"figure.{kind}")
            for attempt in range(2)
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_one_domain_has_no_distances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_unit(tmp_path / "run", "msmt17")
    write_bank(tmp_path / "run" / "buffer_bank.npz", DOMAINS, unseen=DOMAINS[1:])
    assert buffer_bank.main([str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "buffer_bank_distances.csv").exists()
    assert "left out, never seen in training: CUHK02, CUHK03, CUHK-SYSU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["run", "--channels", "0"], "--channels: expected a whole number from 1"),
        (["run", "--layers", "bn9"], "--layers: unknown layer 'bn9' (did you mean 'bn1'?)"),
    ],
)
def test_bad_usage_gets_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    write_unit(tmp_path / "run", "msmt17")
    monkeypatch.chdir(tmp_path)
    assert buffer_bank.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
