"""The saved view of a W&B project: its panels are about what is logged, and it is saved once."""

import json
import re
from types import SimpleNamespace

import pytest
from report.ledgers import ledger_of

from liveselect.cli import main
from liveselect.monitoring import evaluation_scalars, round_scalars, workspace
from liveselect.monitoring.view import SCREEN, sectioned
from liveselect.monitoring.wandb_sink import WandbSink
from liveselect.monitoring.workspace import NAME, SECTIONS, build_workspace, save_in_background, save_workspace

TABLES = {"liveselect/examples", "liveselect/groups"}  # written by the W&B sink, see tests/callbacks/test_monitor.py


def logged() -> set[str]:
    """The scalars of rounds that know everything."""
    ledger = ledger_of("UCBSelector", [6.0, 5.0], round_seconds=1.0)
    record = ledger.rounds[1]
    for name in record.groups:
        record.groups[name] |= {"reward": 1.0, "pulls": 2.0, "bonus": 0.5}
    record.metrics.update({f"drift/{name}": 0.5 for name in ("rank_correlation", "overlap", "mixture")})
    record.metrics.update(
        dict.fromkeys(
            (
                "reference_loss_zero_step",
                "regressor/top_fifth",
                "regressor/held_out",
                "mixture_loss",
                "effective_epochs",
                "mfu_training",
                "mfu_whole",
            ),
            0.5,
        )
    )
    record.metrics.update({"canary/reference": 1.0, "canary/random": 0.0})
    numbers = {*round_scalars(record, ledger, ["prose", "code"]), *evaluation_scalars(ledger.evaluations[0])}
    return {sectioned(name) for name in numbers}


@pytest.fixture
def spec():
    """The view as it is sent to the server."""
    pytest.importorskip("wandb_workspaces")
    view = build_workspace("team", "pretraining")._to_model()
    assert (view.entity, view.project, view.name) == ("team", "pretraining", NAME)
    return json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))


def test_every_panel_is_about_something_that_is_logged(spec):
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections[: len(SECTIONS)]] == list(SECTIONS)
    seen = set()
    for section, panels in zip(sections, SECTIONS.values(), strict=False):
        assert len(section["panels"]) == len(panels)
        for drawn, panel in zip(section["panels"], panels, strict=True):
            if panel.kind == "table":
                assert f"{SCREEN}{panel.keys[0]}" in json.dumps(drawn)
                seen.add(f"{SCREEN}{panel.keys[0]}")
                continue
            config = drawn["config"]
            assert config["chartTitle"] == panel.title
            assert config["xAxis"] in logged()
            wanted = [config["metricRegex"]] if "metricRegex" in config else map(re.escape, config["metrics"])
            for pattern in wanted:
                found = {key for key in logged() if re.fullmatch(pattern, key)}
                assert found, pattern
                seen |= found
    left_out = {key.split("/")[1] for key in logged() | TABLES if key not in seen}
    assert left_out == {"round", "step", "total_flops", "round_seconds"}  # axes, and the sum of the phases


class Server:
    """W&B as far as views go."""

    def __init__(self, monkeypatch) -> None:
        pytest.importorskip("wandb_workspaces")
        from wandb_workspaces.workspaces import interface, internal

        self.saved, self.view = [], None
        monkeypatch.setattr(internal, "get_view_dict", self.find)
        monkeypatch.setattr(internal, "upsert_view2", self.save)
        monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
        monkeypatch.setattr(interface.wandb, "Api", lambda: None)

    def find(self, entity, project, name):
        assert name == NAME.removeprefix("nw-").removesuffix("-v")
        if self.view is None:
            raise ValueError(f"Workspace `{name}` not found in project `{project}`")
        return {"spec": self.view.spec.model_dump_json(by_alias=True), "displayName": "edited", "id": "VIEW7"}

    def save(self, view):
        self.saved.append((view.name, view.id))
        self.view = view
        return {"upsertView": {"view": {"name": view.name, "id": "VIEW7"}}}


def test_the_view_is_saved_once_and_stays_as_somebody_left_it(monkeypatch, capsys):
    server = Server(monkeypatch)
    url = save_workspace("team", "pretraining")
    assert url == "https://wandb.example/team/pretraining?nw=liveselect"
    assert server.saved == [(NAME, "")]
    assert save_workspace("team", "pretraining") == url
    assert len(server.saved) == 1
    banks = server.view.spec.section.panel_bank_config
    titles = [[section.name, len(section.panels)] for section in banks.sections]
    assert titles[0] == ["Does it help?", len(SECTIONS["Does it help?"])]
    banks.sections[0].name, banks.sections[1].panels = "mine", []
    assert main(["workspace", "team/pretraining", "--replace"]) == 0
    assert url in capsys.readouterr().out
    assert server.saved[1:] == [(NAME, "VIEW7")]
    assert server.view.display_name == NAME.split("-")[1]
    assert [[each.name, len(each.panels)] for each in server.view.spec.section.panel_bank_config.sections] == titles


def test_a_run_saves_the_view_in_the_background_and_an_offline_one_does_not(monkeypatch):
    server = Server(monkeypatch)
    run = SimpleNamespace(entity="team", project="pretraining", offline=True)
    WandbSink(run).save_view()
    threads = []
    monkeypatch.setattr(
        "liveselect.monitoring.wandb_sink.save_in_background", lambda *names: threads.append(save_in_background(*names))
    )
    run.offline = False
    WandbSink(run).save_view()
    threads[0].join()
    assert server.saved == [(NAME, "")]


def test_a_server_that_refuses_costs_a_line(monkeypatch, caplog):
    Server(monkeypatch)

    def refuse(entity, project, name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("wandb_workspaces.workspaces.internal.get_view_dict", refuse)
    save_in_background("team", "pretraining").join()
    assert "could not be saved in W&B, training goes on without it: no route to host" in caplog.text


def test_without_the_package_nothing_is_saved_and_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.workspaces", None)
    assert save_in_background("team", "pretraining") is None
    assert main(["workspace", "team/pretraining"]) == 1
    assert workspace.INSTALL in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["workspace", "pretraining"])
    assert "expected ENTITY/PROJECT" in capsys.readouterr().err
