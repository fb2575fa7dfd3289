"""The files of the decision ledger: equal when repeated, read by others, refused when damaged."""

import pytest
import torch
from fakes import play, random_source

from liveselect.decisions import DecisionLedger, find_decisions, read_plan, read_round, rounds_in
from liveselect.decisions.diff import compare_runs
from liveselect.decisions.explain import explain
from liveselect.rounds import SelectionRun
from liveselect.selectors import UniformSelector


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
