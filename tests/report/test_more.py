"""Alarms, maps, unfinished runs, PNG files and damaged ledgers."""

import json
import re

import numpy as np
import pytest
from report.ledgers import ledger_of
from sklearn.decomposition import PCA

from liveselect.cli import main
from liveselect.ledger import Alarm, Ledger
from liveselect.report import Run, build_page, load_runs, verdict, write_pictures, write_report
from liveselect.report.cluster_map import find_map, flattened


def test_alarms_stand_in_the_page_with_their_round():
    ledger = ledger_of("RegressionSelector", [6.0, 4.0])
    assert "alarm" not in re.sub(
        r"<script.*?</script>|<style.*?</style>", "", build_page([Run("mates", ledger)]), flags=re.DOTALL
    )
    ledger.rounds[1].alarms.append(Alarm(1, 10, "flip", "turned <around>"))
    page = build_page([Run("mates", ledger)])
    assert "Round 1, step 10: turned &lt;around&gt;." in page
    assert "flip: 1 alarm<" in page


def killed(seconds: float = 0.0) -> Run:
    """A run that was killed before its training was charged for the first time."""
    ledger = ledger_of("RegressionSelector", [6.0], round_seconds=2.0)
    ledger.evaluations.clear()
    ledger.training_seconds, ledger.training_flops, ledger.finished = seconds, 0.0, False
    return Run("mates", ledger)


def test_a_killed_run_is_said_to_be_one_and_has_no_share_where_training_was_not_charged():
    page = build_page([killed()])
    assert "mates was stopped, or is still running: its record ends at step 0" in page
    row = page.split('aria-label="Comparison of the runs"')[1].split("</table>")[0]
    assert "100%" not in row
    assert "stops before the first" in page
    assert "20%" in build_page([killed(8.0)]).split('aria-label="Comparison of the runs"')[1].split("</table>")[0]


def test_a_finished_run_and_an_old_ledger_are_not_called_killed():
    for finished in (True, None):
        ledger = ledger_of("RegressionSelector", [6.0, 4.0])
        ledger.finished = finished
        assert not any("stopped" in text for text in verdict.caveats([Run("mates", ledger)], "val_loss"))


def test_the_map_is_the_first_two_principal_components():
    points = np.random.default_rng(0).normal(size=(30, 7)) * np.arange(1, 8)
    expected = PCA(2).fit_transform(points)
    np.testing.assert_allclose(np.abs(flattened(points)), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(flattened(points), flattened(points[:, ::-1])[:, :], atol=1e-9)


def test_a_map_is_found_by_the_configuration_and_missing_files_do_no_harm(tmp_path):
    folder = tmp_path / "pool/fine"
    folder.mkdir(parents=True)
    config = f"data:\n  init_args:\n    pool: {tmp_path / 'pool'}\n    groups: fine\n"
    assert find_map(config) is None
    (folder / "clusters.json").write_text(json.dumps({"names": ["prose", "code", "c"]}))
    np.save(folder / "centroids.npy", np.eye(3, 5))
    found = find_map(config)
    assert found.names == ("prose", "code", "c")
    assert found.places.shape == (3, 2)
    assert "Where mates looked" in build_page([Run("mates", ledger_of("RegressionSelector", [6.0, 5.0]), config)])
    relative = "data:\n  init_args:\n    pool: pool\n    groups: fine\n"
    assert find_map(relative) is None
    assert find_map(relative, tmp_path / "runs" / "mates" / "selection").names == found.names
    for text in ("", "data: 3", "not: [yaml", "data:\n  init_args:\n    pool: 7\n"):
        assert find_map(text) is None


def test_png_files_hold_every_picture_in_the_colours_of_the_page(tmp_path):
    import matplotlib.image

    ledger_of("RegressionSelector", [6.0, 5.0]).write(tmp_path / "run/ledger.jsonl")
    written = write_pictures([tmp_path / "run"], tmp_path / "png")
    page = build_page([Run("run", ledger_of("RegressionSelector", [6.0, 5.0]))])
    losses = 3  # axes, of the metric that is compared; the page has the others too
    assert len(written) == page.count("data-chart=") - losses
    image = matplotlib.image.imread(written[0])
    pixels = {tuple(pixel) for pixel in (image[..., :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert (0x00, 0x63, 0xA5) in pixels  # the first series, on white
    assert (255, 255, 255) in pixels
    assert (1, 2, 16) not in pixels


def test_a_picture_alone_has_a_title_and_names_its_lines(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    said = []
    save = Figure.savefig

    def noted(figure, target, **settings):
        legend = figure.axes[0].get_legend()
        said.append([figure.get_suptitle(), *([text.get_text() for text in legend.get_texts()] if legend else [])])
        save(figure, target, **settings)

    monkeypatch.setattr(Figure, "savefig", noted)
    names = ["_r$\\frac$", "mates"]
    for name, selector in zip(names, ["UniformSelector", "RegressionSelector"], strict=True):
        ledger_of(selector, [6.0, 5.0]).write(tmp_path / name / "ledger.jsonl")
    write_pictures([tmp_path / name for name in names], tmp_path / "png")
    assert said[0][0].replace("\n", " ").startswith("val_loss against training steps, for")
    assert [text.strip() for text in said[0][1:]] == names
    assert ["compared", "chosen"] in [texts[1:] for texts in said]


def test_runs_are_called_as_asked_or_as_their_logger_or_their_folder(tmp_path, capsys):
    for name in ("a", "b"):
        ledger = ledger_of("RegressionSelector", [6.0, 5.0])
        ledger.about["name"] = "brisk-river-7" if name == "a" else ""
        ledger.write(tmp_path / name / "selection/ledger.jsonl")
    folders = [tmp_path / "a", tmp_path / "b"]
    assert [run.name for run in load_runs(folders)] == ["brisk-river-7", "b"]
    assert [run.name for run in load_runs(folders, ["x", "y"])] == ["x", "y"]
    with pytest.raises(ValueError, match="a name for each of the 2 runs"):
        load_runs(folders, ["x"])
    arguments = ["report", *map(str, folders), "--name", "first", "second", "--out", str(tmp_path / "page.html")]
    assert main(arguments) == 0
    assert "<title>first and second: liveselect report</title>" in (tmp_path / "page.html").read_text()
    capsys.readouterr()


def test_two_runs_that_their_loggers_call_alike_have_the_names_of_their_folders(tmp_path):
    for name in ("a", "b"):
        ledger = ledger_of("RegressionSelector", [6.0, 5.0])
        ledger.about["name"] = "same"
        ledger.write(tmp_path / name / "ledger.jsonl")
    assert [run.name for run in load_runs([tmp_path])] == ["a", "b"]


def test_the_command_writes_pictures_or_into_a_folder(tmp_path, capsys):
    ledger_of("RegressionSelector", [6.0, 5.0]).write(tmp_path / "run/ledger.jsonl")
    assert main(["report", str(tmp_path / "run"), "--png", str(tmp_path / "png")]) == 0
    assert "pictures to" in capsys.readouterr().out
    assert len(list((tmp_path / "png").glob("*.png"))) > 3
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert write_report([tmp_path / "run"], tmp_path / "new/page.html").is_file()


def test_a_report_replaces_a_report_and_says_so_and_nothing_else(tmp_path, capsys):
    ledger_of("RegressionSelector", [6.0, 5.0]).write(tmp_path / "wandb/run-20260101_120000-abc/ledger.jsonl")
    run, page = str(tmp_path / "wandb/run-20260101_120000-abc"), tmp_path / "page.html"
    assert main(["report", run, "--out", str(page)]) == 0
    assert f"Wrote {page}" in capsys.readouterr().out
    assert main(["report", run, "--out", str(page)]) == 0
    assert f"Replaced the report {page}" in capsys.readouterr().out
    page.write_text("<title>my thesis</title>")
    assert main(["report", run, "--out", str(page)]) == 1
    assert "exists and is no report of liveselect" in capsys.readouterr().err
    assert page.read_text() == "<title>my thesis</title>"


def test_a_damaged_ledger_is_told_with_its_line(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    ledger_of("RegressionSelector", [6.0, 5.0]).write(path)
    first, second, *others = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[: len(second) // 2] + "\n" + "".join(others))
    assert main(["report", str(path)]) == 1
    said = capsys.readouterr().err
    assert "line 2 is not JSON" in said
    assert "the checkpoint of the run holds the ledger too" in said
    for text in ("7", '{"kind": "run", "about": {}}\n{"kind": "round"}', "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a ledger"):
            Ledger.read(path)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ValueError, match="it is not text"):
        Ledger.read(path)
