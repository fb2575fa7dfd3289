"""Scoring a pool: what comes out, how it goes on after every kind of end, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from fakes import fake_context, planted_source
from ranks import on_ranks
from tiny_encoder import TINY, tiny_regressor
from unrolled_language_model import warm_context

from liveselect import cli, distributed
from liveselect.cli import score, score_job
from liveselect.cli.score_column import column_scores
from liveselect.cli.score_job import REGRESSOR, WORK, ScoreJob
from liveselect.cli.score_proxy import load_proxy, proxy_optimizer
from liveselect.datamodules import write_store
from liveselect.functional.sampling import uniform_subset
from liveselect.influence import OneStepInfluence, PMPInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rehearsal import LOOKED_AT_CANDIDATES
from liveselect.scores import read_scores
from liveselect.selectors import ScoredSelector

POOL, PROBES = 150, 100


@pytest.fixture(scope="module", autouse=True)
def _several_shards():
    """Let a job measure shards of 16 and not one candidate at a time: each shard reads what was solved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_job, "MEASURED_SHARD_DIVISOR", 4)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The scores of a job that nothing stopped."""
    return small_job(tmp_path_factory.mktemp("whole") / "s").run()


def small_context():
    source, planted = planted_source(candidates=POOL, share=0.3, length=12, vocab=50, rows=16)
    return warm_context("sgd", source=source), planted


def small_job(folder, context=None, **settings):
    context = context or small_context()[0]
    return ScoreJob(
        **{
            "model": context.live,
            "round": context.round,
            "estimator": PMPInfluence(steps=4, score_every=2, batch_size=4),
            "regressor": HashedRidgeRegressor(buckets=256),
            "probes": PROBES,
            "folder": folder,
            "shard_size": 64,
            **settings,
        }
    )


def test_scores_are_predictions_of_a_scorer_that_learned_from_measured_influence(tmp_path):
    context, planted = small_context()
    scores = small_job(tmp_path / "s", context).run()
    ids = uniform_subset(POOL, PROBES, context.round.generator("probes"))
    estimator = PMPInfluence(steps=4, score_every=2, batch_size=4)
    context.fit(estimator)
    regressor = HashedRidgeRegressor(buckets=256)
    metrics = regressor.fit(context.round, ids, context.score_ids(estimator, ids).float())
    expected = torch.cat([regressor.predict(context.round, b) for b in context.round.batches(torch.arange(POOL))])
    torch.testing.assert_close(scores.values, expected)
    assert scores.about["metrics"]["spearman"] == pytest.approx(metrics["spearman"])
    assert scores.about["measured"] == PROBES
    assert scores.about["metrics"]["spearman"] > 0.2
    assert (
        planted[scores.values.topk(30).indices].double().mean() > 0.6
    )  # twice its share: the sign survives all the way
    chosen = ScoredSelector(tmp_path / "s", ratio=0.2).select(fake_context(context.source).round, 20).ids
    assert planted[chosen].double().mean() > 0.6
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["scores.json", "scores.npy"]


def test_what_a_job_and_its_proxy_cost_is_kept_with_the_scores_over_every_stop(tmp_path, monkeypatch):
    class Counted(PMPInfluence):
        def score_ids(self, model, round, ids):
            with model.meter.phase("counted"):
                model.meter.add_flops(float(len(ids)))
            return super().score_ids(model, round, ids)

    context, _ = small_context()
    estimator = Counted(steps=2, score_every=1, batch_size=4)
    settings = {
        "estimator": estimator,
        "cost": {"seconds": {"train the proxy": 30.0}, "flops": {"train the proxy": 1e9}},
    }
    predict = ScoreJob._predicted

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ScoreJob, "_predicted", stop)
    with pytest.raises(KeyboardInterrupt):
        small_job(tmp_path / "s", context, **settings).run()
    first = dict(context.meter.seconds)
    assert context.meter.flops["counted"] == PROBES
    monkeypatch.setattr(ScoreJob, "_predicted", predict)
    cost = small_job(tmp_path / "s", small_context()[0], **settings).run().about["cost"]
    assert cost["flops"]["counted"] == PROBES  # measured once, before the stop
    assert cost["flops"]["train the proxy"] == 1e9
    assert cost["seconds"]["train the proxy"] == 30.0
    assert cost["seconds"]["unroll training"] >= first["unroll training"] > 0
    assert {"pull back", "fit scorer", "score the pool"} <= set(cost["seconds"])


def test_any_estimator_can_measure(tmp_path):
    context, _ = small_context()
    scores = small_job(tmp_path / "s", context, estimator=OneStepInfluence(), probes=20).run()
    assert scores.about["estimator"] == "OneStepInfluence"
    assert scores.values.isfinite().all()


def test_the_size_of_the_shards_does_not_matter(tmp_path):
    jobs = [small_job(tmp_path / str(size), shard_size=size, probes=40) for size in (7, 64, 1000)]
    values = [job.run().values for job in jobs]
    torch.testing.assert_close(values[0], values[2])
    torch.testing.assert_close(values[1], values[2])


def test_a_job_that_was_interrupted_at_any_file_goes_on_to_the_same_scores(tmp_path, monkeypatch):
    context, _ = small_context()
    settings = {"probes": 40, "estimator": PMPInfluence(steps=2, score_every=2, batch_size=4)}
    files = []
    whole_file = score_job.whole_file

    @contextmanager
    def counted(path):
        files.append(path.name)
        with whole_file(path) as file:
            yield file

    monkeypatch.setattr(score_job, "whole_file", counted)
    expected = small_job(tmp_path / "whole", context, **settings).run()
    kinds = ["job.json", *["measured"] * 3, "regressor.pt", *["scores"] * 3]
    assert [name.split("-")[0] for name in files] == kinds
    # after a file is as before the next one, so only the last needs both
    for moment, before in [*((moment, True) for moment in range(len(files))), (len(files) - 1, False)]:
        folder = tmp_path / f"{moment}-{before}"
        state = {"files": 0}

        @contextmanager
        def interrupted(path, moment=moment, before=before, state=state):
            state["files"] += 1
            is_now = state["files"] == moment + 1
            with whole_file(path) as file:
                yield file
                if is_now and before:
                    raise KeyboardInterrupt
            if is_now:
                raise KeyboardInterrupt

        monkeypatch.setattr(score_job, "whole_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small_job(folder, context, **settings).run()
        monkeypatch.setattr(score_job, "whole_file", whole_file)
        assert small_job(folder, context, **settings).run().digest == expected.digest


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
    class Once(PMPInfluence):
        def fit(self, model, round):
            assert not (tmp_path / "s" / WORK / REGRESSOR).exists()
            return super().fit(model, round)

    class Stopped(HashedRidgeRegressor):
        predictions, stops = 0, True

        def predict(self, round, batch):
            Stopped.predictions += len(batch["input_ids"])
            if Stopped.stops and Stopped.predictions > LOOKED_AT_CANDIDATES + 130:
                raise KeyboardInterrupt
            return super().predict(round, batch)

    settings = {"estimator": Once(steps=4, score_every=2, batch_size=4), "regressor": Stopped(buckets=256)}
    with pytest.raises(KeyboardInterrupt):
        small_job(tmp_path / "s", **settings).run()
    Stopped.stops, Stopped.predictions = False, 0
    small_job(tmp_path / "s", **settings).run()
    assert Stopped.predictions == POOL - 128  # two shards of 64 were there


def test_another_job_is_not_mixed_with_one_that_was_left_unfinished(tmp_path, monkeypatch):
    context, _ = small_context()

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ScoreJob, "_predicted", stop)
    with pytest.raises(KeyboardInterrupt):
        small_job(tmp_path / "s", context).run()
    with torch.no_grad():
        next(context.model.parameters()).add_(1.0)
    unchanged, _ = small_context()
    other_reference, _ = small_context()
    other_reference.source.references = other_reference.source.references.flip(0)
    for changed in (
        {"probes": 30},
        {"settings": {"a": 1}},
        {"context": context},
        {"context": other_reference},
        {"context": unchanged.but(global_batch=unchanged.live.global_batch + 1)},
    ):
        with pytest.raises(ValueError, match="another job"):
            small_job(tmp_path / "s", **changed).run()


def test_files_that_no_job_made_stay_where_they_are(tmp_path):
    mine = [tmp_path / "s" / "work" / "thesis.txt", tmp_path / "s" / "notes.md"]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    small_job(tmp_path / "s").run()
    taken = tmp_path / "taken" / WORK / "thesis.txt"
    taken.parent.mkdir(parents=True)
    taken.write_text("mine")
    with pytest.raises(FileExistsError, match="files that no scoring job made"):
        small_job(tmp_path / "taken").run()
    numbers = tmp_path / "elsewhere" / "scores.npy"
    numbers.parent.mkdir()
    numbers.write_text("mine")
    with pytest.raises(FileExistsError, match=r"scores.npy is there without scores.json"):
        small_job(tmp_path / "elsewhere", estimator=Unsolvable()).run()
    assert [file.read_text() for file in (*mine, taken, numbers)] == ["mine"] * 4


def test_what_a_job_that_was_killed_at_its_very_end_left_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(score_job.shutil, "rmtree", lambda *arguments, **options: None)
    done = small_job(tmp_path / "s").run()
    assert (tmp_path / "s" / WORK).exists()
    monkeypatch.undo()
    assert small_job(tmp_path / "s").run().digest == done.digest
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["scores.json", "scores.npy"]


@pytest.mark.parametrize("kind", ["measured", "scores", "regressor", "job", "cost"])
def test_a_damaged_file_of_a_job_is_named_and_made_again_when_it_is_deleted(tmp_path, monkeypatch, whole, kind):
    context, _ = small_context()

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ScoreJob, "_assemble", stop)
    with pytest.raises(KeyboardInterrupt):
        small_job(tmp_path / "s", context).run()
    monkeypatch.undo()
    file = sorted((tmp_path / "s" / WORK).glob(f"{kind}*"))[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*: delete ") as told:
        small_job(tmp_path / "s", context).run()
    if kind == "job":
        assert f"delete {file.parent} " in str(told.value)
        return
    file.unlink()
    assert small_job(tmp_path / "s", context).run().digest == whole.digest


def test_two_jobs_do_not_work_in_one_folder(tmp_path):
    refused = []

    class Second(HashedRidgeRegressor):
        def fit(self, round, ids, influence):
            with pytest.raises(ValueError, match=r"another process is scoring into .*wait for it, or end it"):
                small_job(tmp_path / "s").run()
            refused.append(True)
            return super().fit(round, ids, influence)

    small_job(tmp_path / "s", regressor=Second(buckets=256)).run()
    assert refused


def test_a_scorer_that_could_not_work_leaves_nothing_in_the_way_of_another(tmp_path):
    with pytest.raises(ValueError, match="squeeze"):
        small_job(tmp_path / "s", regressor=Column(), settings={"regressor": "Column"}).run()
    small_job(tmp_path / "s", settings={"regressor": "HashedRidgeRegressor"}).run()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["scores.json", "scores.npy"]


def test_finished_scores_are_not_made_again(tmp_path):
    context, _ = small_context()
    done = small_job(tmp_path / "s", context).run()
    again = small_job(tmp_path / "s", context, estimator=Unsolvable(), regressor=Column()).run()
    assert again.digest == done.digest
    with pytest.raises(FileExistsError, match="made in another way: choose another folder"):
        small_job(tmp_path / "s", context, probes=50).run()


def test_too_few_measurements_are_refused(tmp_path):
    context, _ = small_context()
    with pytest.raises(ValueError, match=r"at least 8 probes .* got 5"):
        small_job(tmp_path / "s", context, estimator=Unsolvable(), probes=5).run()
    with pytest.raises(ValueError, match="shard_size=0"):
        small_job(tmp_path / "s", context, shard_size=0).run()
    assert not (tmp_path / "s").exists()


def test_too_few_finite_measurements_are_refused(tmp_path):
    class Broken(PMPInfluence):
        def score_ids(self, model, round, ids):
            return super().score_ids(model, round, ids).where(ids < 7, torch.nan)

    with pytest.raises(ValueError, match="measure more"):
        small_job(tmp_path / "s", estimator=Broken(steps=2, score_every=1, batch_size=4)).run()


class Column(HashedRidgeRegressor):
    def predict(self, round, batch):
        return super().predict(round, batch).unsqueeze(1)


class Unsolvable(PMPInfluence):
    def fit(self, model, round):
        raise AssertionError("hours were spent before the scorer was tried")


def test_a_scorer_that_cannot_work_is_reported_before_anything_is_solved(tmp_path):
    for regressor, message in (
        (Column(), "squeeze"),
        (tiny_regressor(encoder={**TINY, "vocab_size": 3}), "vocab_size 3"),
    ):
        with pytest.raises(ValueError, match=message):
            small_job(tmp_path / message, estimator=Unsolvable(), regressor=regressor).run()
    context = small_context()[0]
    context = context.but(optimizer=torch.optim.Rprop(context.model.parameters()))
    with pytest.raises(TypeError, match="Rprop"):
        small_job(tmp_path / "optimizer", context, estimator=Unsolvable(dynamics="live")).run()


def test_predictions_that_are_not_finite_are_reported_with_what_to_do(tmp_path):
    class Diverged(HashedRidgeRegressor):
        def predict(self, round, batch):
            return super().predict(round, batch).where(batch["id"] != 70, torch.nan)

    with pytest.raises(ValueError, match=r"Diverged makes predictions that are not finite for 1 of 64 .*new folder"):
        small_job(tmp_path / "s", regressor=Diverged()).run()


def _digest_on_this_rank(folder):
    return small_job(folder).run().digest


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_make_the_same_scores_as_one(tmp_path, whole, ranks):
    found = on_ranks(_digest_on_this_rank, ranks, tmp_path / "shared")
    assert len(set(found)) == 1
    torch.testing.assert_close(read_scores(tmp_path / "shared").values, whole.values)


class Late(ScoreJob):
    """The last rank comes to the fit when the others have finished it, if they do not wait."""

    def _fitted(self, ids, influence):
        deadline = time.monotonic() + 1.0
        while distributed.rank() == 1 and time.monotonic() < deadline and not (self.work / REGRESSOR).exists():
            os.sched_yield()
        return super()._fitted(ids, influence)


def _digest_on_this_rank_that_may_be_late(folder):
    job = small_job(folder)
    return Late(**{entry.name: getattr(job, entry.name) for entry in fields(job) if entry.init}).run().digest


def test_a_rank_that_is_late_finds_what_the_others_found(tmp_path):
    found = on_ranks(_digest_on_this_rank_that_may_be_late, 2, tmp_path / "shared")
    assert found == [read_scores(tmp_path / "shared").digest] * 2


# ---- a column of numbers ----------------------------------------------------------------------------------------


def make_pool(path, documents=40, block_size=16, metadata=None, seed=0):
    generator = np.random.default_rng(seed)
    texts = [generator.integers(1, 50, generator.integers(1, 60)) for _ in range(documents)]
    metadata = metadata or [{"edu": float(i), "url": f"u{i}", "count": i} for i in range(documents)]
    return write_store(path, texts, block_size=block_size, vocab_size=50, eos_id=0, metadata=metadata), texts


@pytest.mark.parametrize("block_size", [4, 16, 200])
def test_a_block_has_the_mean_of_its_tokens_documents(tmp_path, block_size):
    store, texts = make_pool(tmp_path / "pool", block_size=block_size)
    numbers, known = [], []
    for i, text in enumerate(texts):
        numbers += [float(i)] * len(text) + [0.0]
        known += [1.0] * len(text) + [0.0]  # the separator belongs to no document
    size = store.rows * block_size
    sums, weights = (np.array(values[:size]).reshape(store.rows, block_size).sum(1) for values in (numbers, known))
    np.testing.assert_allclose(column_scores(store, "edu"), sums / weights, rtol=1e-6)
    np.testing.assert_array_equal(column_scores(store, "count"), column_scores(store, "edu"))


def test_documents_without_a_number_are_left_out_and_blocks_without_any_are_never_drawn(tmp_path):
    documents = [np.full(7, 1 + i % 3) for i in range(12)]  # with a separator, each is one block of 8
    metadata = [{"edu": None if i in (3, 4) else float(i)} for i in range(12)]
    store = write_store(tmp_path / "p", documents, block_size=8, vocab_size=8, eos_id=0, metadata=metadata)
    found = column_scores(store, "edu")
    assert found.tolist() == [-np.inf if i in (3, 4) else float(i) for i in range(12)]


@pytest.mark.parametrize("column", ["url", "quality"])
def test_columns_that_hold_no_numbers_are_refused(tmp_path, column):
    store, _ = make_pool(tmp_path / "pool")
    with pytest.raises(ValueError, match=r"columns of numbers are \['count', 'edu'\]"):
        column_scores(store, column)


def test_the_command_scores_by_a_column(tmp_path, capsys):
    store, _ = make_pool(tmp_path / "pool")
    arguments = ["score", "--pool", str(store.path), "--column", "edu", "--out", str(tmp_path / "s")]
    assert cli.main(arguments) == 0
    scores = read_scores(tmp_path / "s")
    scores.check_fit(store.rows, store.fingerprint)
    assert scores.about["column"] == "edu"
    assert f"{store.rows} scores" in capsys.readouterr().out
    (tmp_path / "begun" / WORK).mkdir(parents=True)
    assert cli.main([*arguments[:-1], str(tmp_path / "begun")]) == 1
    assert "unfinished work of another job" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert cli.main([word.replace("edu", "count") for word in arguments]) == 1
    assert "holds finished scores" in capsys.readouterr().err


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path):
    """A file of `liveselect fit`, with the sections that scoring does not read."""
    store, _ = make_pool(tmp_path / "pool", documents=120)
    reference = [{"input_ids": block.tolist()} for block in torch.randint(1, 50, (6, 16)).long()]
    (tmp_path / "reference.jsonl").write_text("\n".join(json.dumps(row) for row in reference))
    config = {
        "seed_everything": 0,
        "trainer": {"max_steps": 5, "gradient_clip_val": 1.0, "accelerator": "cpu"},
        "model": {
            "class_path": "liveselect.cli.model.CausalLM",
            "init_args": {
                "config": {
                    "model_type": "gpt_neox",
                    "vocab_size": 50,
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                }
            },
        },
        "data": {
            "class_path": "liveselect.datamodules.SelectionDataModule",
            "init_args": {
                "pool": str(store.path),
                "reference": str(tmp_path / "reference.jsonl"),
                "batch_size": 8,
            },
        },
        "select": {"class_path": "liveselect.callbacks.PDS", "init_args": {"scores": str(tmp_path / "s")}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, store


def arguments_for(path, out, estimator="liveselect.influence.PMPInfluence", regressor=None, **options):
    options = {"probes": 32, "shard_size": 64, **options}
    return [
        "score",
        f"--config={path}",
        f"--out={out}",
        f"--estimator={estimator}",
        "--estimator.init_args.steps=3",
        "--estimator.init_args.score_every=2",
        f"--regressor={regressor or 'liveselect.regressors.HashedRidgeRegressor'}",
        "--device=cpu",
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def test_the_command_takes_the_file_of_a_training_run(run_file, tmp_path, capsys):
    path, store = run_file
    assert cli.main(arguments_for(path, tmp_path / "s")) == 0
    scores = read_scores(tmp_path / "s")
    scores.check_fit(store.rows, store.fingerprint)
    assert scores.about["settings"]["clipping"]["gradient_clip_val"] == 1.0
    assert scores.about["settings"]["estimator"]["init_args"]["steps"] == 3
    said = capsys.readouterr().out
    assert "held-out Spearman" in said
    assert "PDS(scores=" in said


def test_a_checkpoint_of_the_trainer_is_the_proxy_with_its_moments(run_file, tmp_path):
    path, _ = run_file
    config = score.parser().parse_args(arguments_for(path, tmp_path / "s")[1:])
    proxy = score.instantiated(score.parser(), config).model
    optimizer = proxy.configure_optimizers()["optimizer"]
    for parameter in proxy.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    states = [optimizer.state_dict()]
    torch.save(
        {"state_dict": proxy.state_dict(), "optimizer_states": states, "global_step": 7}, tmp_path / "proxy.ckpt"
    )
    fresh = score.instantiated(score.parser(), config).model
    loaded = load_proxy(fresh, tmp_path / "proxy.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), proxy.parameters(), strict=True))
    warm = proxy_optimizer(fresh, PMPInfluence(), loaded)
    first = next(iter(fresh.parameters()))
    assert torch.equal(warm.state[first]["exp_avg"], optimizer.state[next(iter(proxy.parameters()))]["exp_avg"])
    assert cli.main(arguments_for(path, tmp_path / "a", ckpt_path=tmp_path / "proxy.ckpt")) == 0
    assert cli.main(arguments_for(path, tmp_path / "b")) == 0
    assert read_scores(tmp_path / "a").digest != read_scores(tmp_path / "b").digest


@pytest.mark.parametrize("together", [1, 7, 1000])
def test_mean_and_deviation_do_not_depend_on_how_many_are_looked_at_at_once(monkeypatch, together):
    monkeypatch.setattr(score, "SCORES_PER_CHUNK", together)
    values = 1e3 + torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[::9] = -torch.inf
    known = values[values > -torch.inf]
    expected = len(known), float(known.mean()), float(known.std(correction=0))
    assert score.moments(values) == pytest.approx(expected, rel=1e-12)


def test_checkpoints_and_devices_that_do_not_fit_are_reported_in_a_sentence(run_file, tmp_path, capsys, monkeypatch):
    path, _ = run_file
    torch.save({"state_dict": {"other": torch.zeros(1)}}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": PMPInfluence()}, tmp_path / "objects.ckpt")
    (tmp_path / "short.ckpt").write_bytes((tmp_path / "other.ckpt").read_bytes()[:100])
    for name, message in {
        "other": "does not fit the model section",
        "objects": "only state_dict, optimizer_states and global_step are needed",
        "short": "cannot be read",
        "absent": "expected a checkpoint of the proxy at",
    }.items():
        assert cli.main(arguments_for(path, tmp_path / "s", ckpt_path=tmp_path / f"{name}.ckpt")) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([*arguments_for(path, tmp_path / "s"), "--device=cuda"]) == 1
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_proxy_with_too_small_a_vocabulary_is_reported_before_anything_is_solved(run_file, tmp_path, capsys):
    path, _ = run_file
    small = "--model.init_args.config={model_type: gpt_neox, vocab_size: 20, hidden_size: 16, num_hidden_layers: 1, "
    small += "num_attention_heads: 2, intermediate_size: 32}"
    assert cli.main([*arguments_for(path, tmp_path / "s"), small]) == 1
    assert "the pool holds token ids up to 49, but the model knows only 20 tokens" in capsys.readouterr().err


def test_without_a_proxy_or_a_column_the_command_says_what_it_needs(capsys, tmp_path):
    assert cli.main(["score", f"--out={tmp_path}/s"]) == 1
    assert "expected a model (the proxy) and data" in capsys.readouterr().err
    assert cli.main(["score", f"--out={tmp_path}/s", "--column=edu"]) == 1
    assert "--pool together with --column" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("moment", [("DIES_AT_MEASUREMENT", "2"), ("DIES_AT_PREDICTION", "9")])
def test_a_command_that_was_killed_goes_on_to_the_same_scores(run_file, tmp_path, moment):
    path, _ = run_file
    parts = {"estimator": "killed_scorer.KilledInfluence", "regressor": "killed_scorer.KilledRegressor"}

    def command(out, **environment):
        code = "import sys; from liveselect.cli import main; sys.exit(main(sys.argv[1:]))"
        arguments = arguments_for(path, out, **parts, probes=100)
        paths = os.pathsep.join(map(str, sys.path))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=False).returncode

    assert command(tmp_path / "killed", **dict([moment])) == -signal.SIGKILL
    assert command(tmp_path / "killed") == 0
    assert command(tmp_path / "whole") == 0
    assert read_scores(tmp_path / "killed").digest == read_scores(tmp_path / "whole").digest
