"""The files of the decision ledger: equal when repeated, read by others, refused when damaged."""

import numpy as np
import pytest
import torch
from fakes import play, random_source
from small_run import SmallLM, small_data, small_trainer

from liveselect.callbacks import MATES, PDS, DataSelection, Quad
from liveselect.decisions import DecisionLedger, find_decisions, read_plan, read_round, read_scores, rounds_in
from liveselect.decisions.diff import compare_runs
from liveselect.decisions.explain import explain, lines_about
from liveselect.decisions.table import BELOW, PASSED
from liveselect.influence import OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rounds import SelectionRun
from liveselect.selectors import RegressionSelector, ScoredSelector, UniformSelector


def trained(folder, rounds=3, state=None, seed=0):
    source = random_source(64)
    parts = UniformSelector(), None, UniformSelector(), 0, source
    run = SelectionRun(*parts, seed=seed, decisions=DecisionLedger(folder))
    states = []
    if state is not None:
        run.load_state_dict(state)
    for _ in range(run.next_round, rounds):
        states.append(run.state_dict())
        play(run, 8)
    return run, states


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_resumed_run_writes_the_same_again_and_drops_what_lies_ahead(tmp_path):
    _, states = trained(tmp_path / "decisions")
    before = contents(tmp_path / "decisions")
    trained(tmp_path / "decisions", rounds=2, state=states[1])
    assert contents(tmp_path / "decisions") == {name: before[name] for name in sorted(before)[:2]}
    trained(tmp_path / "decisions", state=states[1])
    assert contents(tmp_path / "decisions") == before


def test_another_run_in_the_same_folder_keeps_the_record_of_the_first(tmp_path):
    trained(tmp_path / "decisions")
    before = contents(tmp_path / "decisions")
    trained(tmp_path / "decisions", rounds=1, seed=7)
    assert contents(tmp_path / "decisions-1") == before
    assert find_decisions(tmp_path) == tmp_path / "decisions"
    assert list(rounds_in(tmp_path / "decisions")) == [0]


def test_pandas_datasets_duckdb_and_pyarrow_read_the_rows(tmp_path):
    import pandas as pd
    from datasets import load_dataset

    run, _ = trained(tmp_path / "decisions")
    files = [str(path) for path in rounds_in(tmp_path / "decisions").values()]
    frame = pd.read_parquet(tmp_path / "decisions")
    data = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    last = frame[(frame["round"] == 2) & frame["chosen"]].sort_values("place")
    assert last["id"].tolist() == run.plan.ids.tolist()
    assert data["id"] == frame["id"].tolist()
    assert data["score"] == [None] * 24
    assert frame["reason"].unique().tolist() == ["drawn uniformly"]
    import duckdb

    found = duckdb.sql(f"SELECT count(*), count(DISTINCT id) FROM '{tmp_path}/decisions/*.parquet'").fetchall()
    assert found == [(24, 24)]
    import pyarrow.dataset as ds

    chosen = ds.dataset(tmp_path / "decisions").to_table(filter=ds.field("chosen") & (ds.field("round") == 2))
    assert set(chosen["id"].to_pylist()) == set(run.plan.ids.tolist())


def test_a_damaged_file_is_refused(tmp_path):
    trained(tmp_path / "decisions")
    path = rounds_in(tmp_path / "decisions")[0]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{path}.*damaged or copied in part"):
        read_plan(path)
    with pytest.raises(ValueError, match=rf"{path}.*damaged or copied in part"):
        read_round(path)


def test_damage_inside_of_a_file_is_reported_with_its_name(tmp_path):
    """The end of the file, which describes the rest, is whole."""
    trained(tmp_path / "decisions")
    path = rounds_in(tmp_path / "decisions")[1]
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    for read in (lambda: read_plan(path), lambda: explain(tmp_path, 3), lambda: compare_runs(tmp_path, tmp_path)):
        with pytest.raises(ValueError, match=rf"{path}.*damaged or copied in part"):
            read()


def test_a_plan_that_was_changed_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    trained(tmp_path / "decisions")
    path = rounds_in(tmp_path / "decisions")[0]
    table = pq.read_table(path)
    swapped = table.set_column(2, "id", pa.array(table["id"].to_pylist()[::-1]))
    pq.write_table(swapped.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(ValueError, match="does not hold the plan that it names"):
        read_plan(path)


def test_a_folder_without_or_with_several_runs_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_decisions(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="the first file appears with the first round"):
        find_decisions(tmp_path)
    trained(tmp_path / "a" / "decisions", 1)
    (tmp_path / "a" / "ledger.jsonl").write_text("")
    assert find_decisions(tmp_path) == find_decisions(tmp_path / "a" / "ledger.jsonl") == tmp_path / "a" / "decisions"
    trained(tmp_path / "b" / "decisions", 1)
    with pytest.raises(ValueError, match="several runs, name one"):
        find_decisions(tmp_path)


def test_ids_are_found_without_reading_the_rest(tmp_path):
    run, _ = trained(tmp_path / "decisions", 1)
    wanted = run.plan.ids[:2].tolist()
    rows = read_round(rounds_in(tmp_path / "decisions")[0], ["id", "place"], ids=wanted)
    assert dict(zip(rows["id"], rows["place"], strict=True)) == {wanted[0]: 0, wanted[1]: 1}
    assert torch.equal(run.plan.ids, read_plan(rounds_in(tmp_path / "decisions")[0]).ids)


def test_a_run_may_be_called_by_the_folder_of_wandb(tmp_path):
    trained(tmp_path / "project" / "abc123" / "selection" / "decisions", 1)
    found = tmp_path / "project" / "abc123" / "selection" / "decisions"
    sent = tmp_path / "wandb" / "offline-run-20260101_120000-abc123"
    sent.mkdir(parents=True)
    (tmp_path / "wandb" / "latest-run").symlink_to(sent.name)
    (tmp_path / "other" / "xyz").mkdir(parents=True)
    for name in (sent, tmp_path / "wandb" / "latest-run", tmp_path / "project" / "abc123", tmp_path / "project"):
        assert find_decisions(name) == found
    lost = tmp_path / "wandb" / "run-20260101_120000-lost"
    lost.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no decisions"):
        find_decisions(lost)


def ready(folder, rounds=5, temperature=0.0, **settings):
    """Play rounds of ready scores, of which only the first needs to hold them all."""
    values = torch.linspace(-1, 1, 4000).sin()
    source = random_source(4000)
    run = SelectionRun(
        ScoredSelector(values.numpy(), ratio=0.5, temperature=temperature), None, UniformSelector(), 0, source
    )
    run.decisions = DecisionLedger(folder / "decisions", **settings)
    for _ in range(rounds):
        play(run, 20)
    return run, values, list(rounds_in(folder / "decisions").values())


def test_ready_scores_are_written_once_and_read_in_every_round(tmp_path):
    run, values, files = ready(tmp_path / "run")
    first, *later = [len(read_round(path)["id"]) for path in files]
    assert (first, later) == (4000, [20] * 4)
    assert max(path.stat().st_size for path in files[1:]) < files[0].stat().st_size / 2
    for path in files:
        scores = read_scores(path)
        assert np.array_equal(np.sort(scores["id"].to_numpy()), np.arange(4000))
        assert np.allclose(scores["score"].to_numpy(), values[scores["id"].to_numpy()])
    plans = [read_plan(path) for path in files]
    assert plans[-1].fingerprint == run.plan.fingerprint  # a replay follows the same
    never = next(i for i in range(4000) if all(i not in plan.ids for plan in plans))
    text = "\n".join(lines_about(never, explain(tmp_path / "run", never)))
    assert f"in rounds 1-4 it was not chosen, by the same score as before ({values[never]:.6g})" in text
    assert "neither compared" not in text
    again, _, _ = ready(tmp_path / "again")
    assert again.plan.fingerprint == run.plan.fingerprint
    for found in compare_runs(tmp_path / "run", tmp_path / "again"):
        assert (found.same_plan, found.scored, round(found.correlation, 6)) == (True, 4000, 1.0)


def test_without_the_first_file_ready_scores_are_written_again(tmp_path):
    run, _, files = ready(tmp_path, rounds=2)
    files[0].unlink()
    play(run, 20)
    assert len(read_round(rounds_in(tmp_path / "decisions")[2])["id"]) == 4000 - 40


def test_scores_that_a_bound_left_out_are_bounded_in_later_rounds_too(tmp_path):
    _, _, files = ready(tmp_path, most_rejected=100)
    assert all(len(read_round(path)["id"]) <= 100 + 2 * 20 for path in files)


def test_with_noise_what_crosses_the_threshold_is_written_with_its_reason(tmp_path):
    _, _, files = ready(tmp_path, temperature=0.02)
    tables = [read_round(path) for path in files]
    assert max(len(table["id"]) for table in tables[1:]) < len(tables[0]["id"]) / 4
    before = dict(zip(tables[0]["id"], tables[0]["reason"], strict=True))
    for table in tables[1:]:
        assert set(table["reason"]) >= {BELOW, PASSED}
        assert all(
            before[i] != reason for i, reason in zip(table["id"], table["reason"], strict=True) if reason == BELOW
        )


def test_the_bound_on_recorded_candidates_is_an_argument_of_every_preset(tmp_path):
    for preset in (
        PDS(torch.zeros(4).numpy(), most_rejected=7),
        Quad(most_rejected=7),
        MATES(regressor=HashedRidgeRegressor(), most_rejected=7),
    ):
        assert preset.most_rejected == 7
    with pytest.raises(ValueError, match="most_rejected of zero or more"):
        DataSelection(UniformSelector(), most_rejected=-1)
    selection = DataSelection(
        RegressionSelector(HashedRidgeRegressor(), probes=12), OneStepInfluence(), every_n_steps=4, most_rejected=3
    )
    small_trainer(tmp_path, [selection], max_steps=6).fit(SmallLM(), datamodule=small_data())
    assert selection.run.decisions.most_rejected == 3
