"""YAML files of an earlier version are refused with what to write instead."""

from pathlib import Path

import pytest
import yaml

from liveselect import cli
from liveselect.cli.old_files import refuse_old_files

CONFIGS = Path(__file__).parents[2] / "configs"


def select(folder, name="old.yaml", class_path="liveselect.callbacks.PDS", **arguments):
    section = {"class_path": class_path, "init_args": arguments}
    path = folder / name
    path.write_text(yaml.safe_dump({"select": {key: value for key, value in section.items() if value}}))
    return f"--config={path}"


def refusal(capsys, *arguments):
    assert cli.main(["fit", *arguments]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("class_path", ["liveselect.callbacks.PDS", "PDS"])
def test_live_pds_of_the_first_version_is_refused_with_its_new_name(tmp_path, capsys, class_path):
    said = refusal(capsys, f"--config={CONFIGS / 'pds.yaml'}", select(tmp_path, class_path=class_path, live=True))
    expected = "`live: true` of liveselect 0.1 is the preset LivePDS since 0.2: write class_path: "
    assert f"old.yaml: {expected}liveselect.callbacks.LivePDS without live" in said
    assert "Traceback" not in said


def test_a_preset_among_the_callbacks_of_the_trainer_is_looked_at_too(tmp_path, capsys):
    path = tmp_path / "old.yaml"
    preset = {"class_path": "liveselect.callbacks.PDS", "init_args": {"live": True}}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [preset]}}))
    assert "`live: true` of liveselect 0.1 is the preset LivePDS" in refusal(capsys, f"--config={path}")


@pytest.mark.parametrize("name", ["probes", "estimator", "regressor", "min_spearman"])
def test_arguments_that_pds_no_longer_takes_are_named(tmp_path, capsys, name):
    said = refusal(capsys, select(tmp_path, scores="scores/pds", **{name: 1}))
    assert f"old.yaml: `{name}` of PDS in liveselect 0.1 belong to the preset LivePDS since 0.2" in said


def test_a_saved_file_of_the_first_version_names_all_that_has_to_go(tmp_path, capsys):
    said = refusal(capsys, select(tmp_path, scores="scores/pds", live=False, probes=4096, ratio=0.4))
    assert "`live`, `probes` of PDS" in said or "`probes`, `live` of PDS" in said
    assert "leave out what is named here to draw from scores" in said


def test_a_file_that_changes_arguments_of_an_earlier_one_is_read_with_its_class(tmp_path, capsys):
    on_top = select(tmp_path, "on_top.yaml", class_path="", live=True)
    said = refusal(capsys, "-c", str(CONFIGS / "pds.yaml"), on_top)
    assert "on_top.yaml: `live: true`" in said


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_files_of_this_version_are_not_refused(path):
    refuse_old_files(["fit", f"--config={path}"])


def test_the_arguments_of_live_pds_and_classes_of_others_are_not_refused(tmp_path):
    refuse_old_files([select(tmp_path, class_path="liveselect.callbacks.LivePDS", probes=100)])
    refuse_old_files([select(tmp_path, class_path="mine.PDS", live=True)])
    refuse_old_files(["--config=nowhere.yaml", "--config", "{select: {class_path: PDS}}"])


OPTIONS = [
    ("--select.live=true", "--select=liveselect.callbacks.LivePDS without --select.live"),
    ("--select.live true", "--select=liveselect.callbacks.LivePDS without --select.live"),
    ("--select.init_args.live=True", "without --select.init_args.live"),
    ("--select.live=false", "`live` of PDS in liveselect 0.1 belongs to the preset LivePDS since 0.2: leave it out"),
    ("--select.probes 100", "`probes` of PDS in liveselect 0.1 belongs to the preset LivePDS since 0.2"),
    ("--select.init_args.estimator.init_args.steps=4", "`estimator` of PDS in liveselect 0.1 belongs"),
    ("--select.regressor=HashedRidgeRegressor", "write --select=liveselect.callbacks.LivePDS to solve on the live"),
]


@pytest.mark.parametrize(("option", "expected"), OPTIONS)
@pytest.mark.parametrize("chosen", [[f"--config={CONFIGS / 'pds.yaml'}"], ["--select=PDS"], ["--select", "PDS"]])
def test_options_of_the_first_version_are_refused_with_what_to_write_today(capsys, chosen, option, expected):
    said = refusal(capsys, *chosen, *option.split())
    assert expected in said
    assert "liveselect 0.1" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["--select", '{"class_path": "PDS", "init_args": {"live": true}}'],
        ["--config", "{select: {class_path: PDS, init_args: {live: true}}}"],
        ["--trainer.callbacks+=PDS", "--trainer.callbacks.live=true"],
        ["--trainer.callbacks=[{class_path: PDS, init_args: {live: true}}]"],
        ["--select.live=true"],
        ["--select=LivePDS", "--select.live=true"],
    ],
)
def test_they_are_refused_in_every_place_of_a_command_line(arguments):
    with pytest.raises(ValueError, match=r"`live.* of (PDS in )?liveselect 0\.1 is the preset LivePDS since 0\.2"):
        refuse_old_files(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--select=LivePDS", "--select.probes=100"],
        ["--select=PDS", "--select.scores=scores.npy", "--select=LivePDS", "--select.probes=9"],
        ["--select=MATES", "--select.init_args.regressor=HashedRidgeRegressor"],
        ["--select=mine.PDS", "--select.live=true"],
        ["--select=PDS", "--select.ratio=0.2", "--model.live=true"],
    ],
)
def test_options_of_this_version_are_not_refused(arguments):
    refuse_old_files(arguments)
