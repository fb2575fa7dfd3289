"""Every method scores a pool: a planted signal is found, and the folder says what made it."""

import copy
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fakes import FakeSource, fake_context, planted_source, play
from ranks import on_ranks
from transformers import BertConfig, BertModel, BertTokenizerFast
from unrolled_language_model import warm_context

from liveselect import cli
from liveselect.cli.score_method import MethodJob
from liveselect.cli.score_methods import METHODS, NEEDS_MODEL, build, check_settings
from liveselect.datamodules import TokenStore, write_store
from liveselect.functional.bands import band_order
from liveselect.functional.flops import flops_counted
from liveselect.influence import LossDropInfluence, PerplexityInfluence
from liveselect.ledger import Ledger
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rounds import SelectionRun
from liveselect.scores import read_scores
from liveselect.selectors import (
    PriorSelector,
    RegressionSelector,
    ScoredSelector,
    StratifiedSelector,
    UCBSelector,
    UniformSelector,
)

SETTINGS = {
    "dsir": {"terms": "words"},
    "embed": {"dimensions": 16},
    "rho": {"steps": 8, "learning_rate": 1e-2},
    "tap": {"steps": 8, "learning_rate": 1e-2},
    "less": {"dimensions": 256},
    "perplexity": {"band": "low"},
}


def planted(candidates=120):
    return planted_source(candidates=candidates, share=0.25, length=24, vocab=50, rows=16)


def job(folder, name, context=None, settings=None, **options):
    context = context or warm_context("adamw", source=planted()[0])
    method = build(name, settings or SETTINGS.get(name, {}), context.source)
    model = context.live if name in NEEDS_MODEL else None
    return MethodJob(model=model, round=context.round, method=method, folder=folder, **{"shard_size": 50, **options})


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"near-duplicates", "semantic-duplicates", "perplexity"}))
def test_a_method_finds_the_rows_that_are_like_the_reference_set(name, tmp_path):
    source, wanted = planted()
    scores = job(tmp_path, name, warm_context("adamw", source=source)).run()
    best = wanted[scores.values.topk(30).indices].double().mean()
    assert best > 0.5  # twice their share of the pool
    said = scores.about["method"]
    assert said["name"] == name
    assert said["published"]
    assert set(said["settings"]) == set(check_settings(name, {}))
    assert scores.about["cost"]["seconds"]["score the pool"] >= 0
    assert (sum(scores.about["cost"]["flops"].values()) > 0) is (name in NEEDS_MODEL)
    chosen = ScoredSelector(tmp_path, ratio=0.25, standardize=True).select(fake_context(source).round, 20).ids
    assert wanted[chosen].double().mean() > 0.5


def test_near_duplicates_are_a_filter_of_other_scores(tmp_path):
    source, _ = planted()
    source.tokens[40:50] = source.tokens[:10]
    dropped = job(tmp_path / "unique", "near-duplicates", fake_context(source), {"width": 3}).run()
    assert torch.isneginf(dropped.values).nonzero()[:, 0].tolist() == list(range(40, 50))
    whole = job(tmp_path / "whole", "ngram-ratio", fake_context(source)).run()
    kept = job(tmp_path / "kept", "ngram-ratio", fake_context(source), dropped=dropped).run()
    assert torch.isneginf(kept.values[40:50]).all()
    assert torch.equal(kept.values[:40], whole.values[:40])
    assert kept.about["filter_blake2b"] == dropped.digest
    # any selector honours it behind a prior
    prior = PriorSelector(UniformSelector(), tmp_path / "unique", ratio=1.0)
    chosen = prior.select(fake_context(source).round, 110).ids
    assert sorted(chosen.tolist()) == [i for i in range(120) if not 40 <= i < 50]


def test_perplexity_draws_the_band_first(tmp_path):
    context = warm_context("adamw", source=planted()[0])
    batch = {"input_ids": context.source.tokens, "labels": context.source.tokens}
    losses = context.score(PerplexityInfluence(band=None), batch).neg()
    for band in ("low", "middle", "high"):
        scores = job(tmp_path / band, "perplexity", context, {"band": band}).run().values
        assert torch.equal(scores, band_order(losses, band))


@pytest.mark.parametrize("name", ["ngram-ratio", "tap", "less", "near-duplicates"])
def test_a_job_that_was_stopped_goes_on_to_the_same_scores(name, tmp_path, monkeypatch):
    expected = job(tmp_path / "whole", name).run()
    seen = []
    scores_of = MethodJob._scores_of

    def stops_later(self, batch):
        seen.append(len(batch["id"]))
        if len(seen) == 6:
            raise KeyboardInterrupt
        return scores_of(self, batch)

    monkeypatch.setattr(MethodJob, "_scores_of", stops_later)
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path / "stopped", name).run()
    assert job(tmp_path / "stopped", name).run().digest == expected.digest
    assert len(seen) < 2 * 10  # a shard of 50 is 4 batches: the first was not scored again
    with pytest.raises(FileExistsError, match="made in another way"):
        job(tmp_path / "stopped", name, seed_of(1)).run()


def seed_of(seed):
    return warm_context("adamw", source=planted()[0], seed=seed)


def _digest(folder, name):
    return job(folder, name, shard_size=20).run().digest


@pytest.mark.parametrize("name", ["dsir", "tap"])
def test_two_processes_share_out_the_pool_and_come_to_the_same_scores(name, tmp_path):
    alone = job(tmp_path / "alone", name, shard_size=20).run()
    found = on_ranks(_digest, 2, tmp_path / "shared", name)
    assert found == [read_scores(tmp_path / "shared").digest] * 2
    torch.testing.assert_close(read_scores(tmp_path / "shared").values, alone.values)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A file of `liveselect fit`, the files of two methods, and which blocks are planted."""
    folder = tmp_path_factory.mktemp("run")
    source, wanted = planted()
    documents = [row.numpy() for row in source.tokens]
    store = write_store(folder / "pool", documents, block_size=24, vocab_size=50, eos_id=None)
    reference = "\n".join(json.dumps({"input_ids": row.tolist()}) for row in source.references)
    (folder / "reference.jsonl").write_text(reference)
    network = {"model_type": "gpt_neox", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    network |= {"num_attention_heads": 2, "intermediate_size": 32}
    config = {
        "seed_everything": 0,
        "trainer": {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        | {"default_root_dir": str(folder / "runs"), "enable_progress_bar": False},
        "model": {"class_path": "liveselect.cli.model.CausalLM", "init_args": {"config": network}},
        "data": {
            "class_path": "liveselect.datamodules.SelectionDataModule",
            "init_args": {
                "pool": str(store.path),
                "reference": str(folder / "reference.jsonl"),
                "batch_size": 8,
            },
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "tap.yaml").write_text("method: tap\nsettings: {steps: 8, learning_rate: 0.01}\n")
    return folder, wanted


def score_with(folder, *arguments, out):
    return cli.main(["score", f"--config={folder}/run.yaml", "--device=cpu", f"--out={folder}/{out}", *arguments])


def test_the_command_takes_methods_and_settings_from_options_and_files(run, capsys):
    folder, wanted = run
    assert score_with(folder, "--method=ngram-ratio", "--settings.smoothing=10", out="ratio") == 0
    assert score_with(folder, f"--config={folder}/tap.yaml", out="tap") == 0
    for name in ("ratio", "tap"):
        scores = read_scores(folder / name)
        assert wanted[scores.values.topk(30).indices].double().mean() > 0.5
    assert read_scores(folder / "ratio").about["method"]["settings"]["smoothing"] == 10
    assert read_scores(folder / "tap").about["method"]["settings"]["steps"] == 8
    assert "draw from them" in capsys.readouterr().out
    assert score_with(folder, "--method=ngram-ratio", "--settings.smoothing=10", out="ratio") == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=magic"], "expected --method to be one of"),
        (["--method=bm25", "--settings.k2=1"], "Option 'k2' is not accepted"),
        (["--method=bm25", "--settings.b=3"], "b in 0..1"),
        (["--method=bm25", "--column=edu"], "expected one of --method, --column and --parts"),
        (["--settings.b=0.5"], "expected --method together with --settings"),
        (["--method=embed", "--settings.embedding=vectors:v.npy"], "reads texts"),
        (["--method=embed", "--settings.embedding=encoder:/absent"], "expected a folder with a model"),
        (["--method=rho", "--settings.reference_model=./absent"], "expected a folder with a model"),
        (["--method=less", "--settings.checkpoints=[absent.ckpt]"], "expected a checkpoint of the Trainer at"),
    ],
)
def test_what_a_method_cannot_do_is_said_in_a_sentence(run, capsys, arguments, message):
    assert score_with(run[0], *arguments, out="refused") == 1
    assert message in capsys.readouterr().err
    assert not (run[0] / "refused" / "scores.json").exists()


def test_the_ledger_of_a_run_that_draws_from_the_scores_has_their_cost(run):
    folder, _ = run
    assert score_with(folder, f"--config={folder}/tap.yaml", out="drawn") == 0
    cost = read_scores(folder / "drawn").about["cost"]
    select = f"--select=liveselect.callbacks.PDS --select.scores={folder}/drawn --select.every_n_steps=1".split()
    assert cli.main(["fit", f"--config={folder}/run.yaml", *select, f"--select.dirpath={folder}/ledger"]) == 0
    (file,) = (folder / "ledger").rglob("ledger.jsonl")
    ledger = Ledger.read(file)
    assert ledger.before_flops == cost["flops"]
    assert ledger.before_flops["train on the reference set"] > 0
    assert ledger.before_seconds == cost["seconds"]


# ---- parts that other engines made -------------------------------------------------------------------------------


def write_part(path, ids, scores, **metadata):
    table = pa.table({"id": ids, "score": scores})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def test_parts_are_joined_by_the_rows_that_they_are_of(run, tmp_path, capsys):
    folder, _ = run
    size, pool = 120, read_pool(folder)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    parts = [
        str(write_part(tmp_path / f"{i}.parquet", ids.tolist(), (ids * 0.5).tolist(), pool=pool))
        for i, ids in enumerate(order.split(50))
    ]
    command = ["score", f"--pool={folder}/pool", f"--out={tmp_path}/joined", "--parts"]
    assert cli.main([*command, json.dumps(parts)]) == 0
    scores = read_scores(tmp_path / "joined")
    assert torch.equal(scores.values, torch.arange(size) * 0.5)
    scores.check_fit(size, pool)
    for wrong, message in (
        (parts[:2], "20 of 120 in none"),
        ([*parts, parts[0]], "50 in several"),
        ([str(write_part(tmp_path / "o.parquet", [0], [1.0], pool="other"))], "join the parts of one pool"),
        ([str(write_part(tmp_path / "b.parquet", [120], [1.0]))], "integers in 0..119"),
    ):
        assert cli.main([*command, json.dumps(wrong)]) == 1
        assert message in capsys.readouterr().err


def read_pool(folder):
    return TokenStore(folder / "pool").fingerprint


# ---- live --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "settings", "phase"),
    [
        ("LossDropInfluence", {"steps": 8, "learning_rate": 0.01}, "train on the reference set"),
        ("ReducibleLossInfluence", {"steps": 8, "learning_rate": 0.01}, "losses of candidates"),
        ("LESSInfluence", {"dimensions": 128}, "example gradients"),
        ("PerplexityInfluence", {"band": "low", "sampled": 20}, "perplexity band"),
        ("NgramRatioInfluence", {}, None),
    ],
)
def test_a_run_measures_live_behind_a_prior_as_its_file_says(run, tmp_path, estimator, settings, phase):
    folder, wanted = run
    if not (folder / "prior").exists():
        assert score_with(folder, "--method=dsir", out="prior") == 0
    inner = {"regressor": "liveselect.regressors.HashedRidgeRegressor", "probes": 40, "min_spearman": None}
    prior = {
        "scores": str(folder / "prior"),
        "ratio": 0.5,
        "selector": {"class_path": "liveselect.selectors.RegressionSelector", "init_args": inner},
    }
    select = {
        "selector": {"class_path": "liveselect.selectors.PriorSelector", "init_args": prior},
        "estimator": {"class_path": f"liveselect.influence.{estimator}", "init_args": settings},
        "every_n_steps": 1,
        "warmup_rounds": 0,
        "dirpath": str(tmp_path / "ledger"),
    }
    live = {"select": {"class_path": "liveselect.callbacks.DataSelection", "init_args": select}}
    (tmp_path / "live.yaml").write_text(yaml.safe_dump(live))
    assert cli.main(["fit", f"--config={folder}/run.yaml", f"--config={tmp_path}/live.yaml"]) == 0
    (file,) = (tmp_path / "ledger").rglob("ledger.jsonl")
    ledger = Ledger.read(file)
    assert len(ledger.rounds) == 2
    for record in ledger.rounds:
        found, influence = wanted[torch.tensor(record.measured)], torch.tensor(record.influence)
        assert found.double().mean() > 0.3  # the prior kept them: their share of the pool is a quarter
        if phase is None:
            assert influence[found].mean() > influence[~found].mean()
            assert "look up n-grams" in record.seconds
        else:
            assert record.flops[phase] > 0
    assert set(read_scores(folder / "prior").about["cost"]["seconds"]) <= set(ledger.before_seconds)


def test_rows_can_be_embedded_by_an_encoder_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    words = [f"w{i}" for i in range(8)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=13, max_position_embeddings=64, **shape)).save_pretrained(tmp_path / "encoder")
    source = FakeSource(torch.arange(8)[:, None].repeat(1, 4), torch.tensor([[3, 3, 3, 3]]))
    monkeypatch.setattr(source, "decode", lambda ids: [" ".join(words[i] for i in row) for row in ids.tolist()])
    settings = {"embedding": f"encoder:{tmp_path / 'encoder'}"}
    scores = job(tmp_path / "s", "embed", fake_context(source), settings).run().values
    assert scores.argmax() == 3
    assert scores[3].item() == pytest.approx(1.0, abs=1e-5)
    cost = read_scores(tmp_path / "s").about["cost"]
    widths = 8 * (2 + 4)  # tokens of the pool, with those that begin and end a text
    per_token = 2 * (4 * 16 * 16 + 2 * 16 * 16) + 4 * (2 + 4) * 16
    expected = per_token * widths
    assert cost["flops"]["score the pool"] == pytest.approx(expected, rel=0.1)  # and a pooler, of one token
    assert cost["flops"]["fit method"] > 0
    assert not cost["uncounted"]


def test_near_duplicates_can_be_found_by_vectors(tmp_path):
    source, _ = planted()
    source.tokens[40:50] = source.tokens[:10]
    scores = job(tmp_path, "semantic-duplicates", fake_context(source), {"dimensions": 32, "threshold": 0.99}).run()
    assert torch.isneginf(scores.values).nonzero()[:, 0].tolist() == list(range(40, 50))
    assert sum(scores.about["cost"]["uncounted"].values()) == 1  # the products of scipy are named


@pytest.mark.parametrize(
    ("name", "words"),
    [("ngram-ratio", False), ("dsir", False), ("dsir", True), ("bm25", False), ("bm25", True), ("embed", False)],
)
def test_padding_of_the_reference_set_is_no_text(name, words, tmp_path):
    tokens = torch.arange(240).view(30, 8) % 20
    short, padding = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(1)), torch.zeros(4, 3).long()
    padded = torch.cat([short, padding], dim=1)
    labels = torch.where(torch.arange(8) < 5, padded, -100)
    sources = FakeSource(tokens, short), FakeSource(tokens, padded, reference_labels=labels)
    settings = {"terms": "words"} if words else {"dimensions": 4} if name == "embed" else {}
    found = [job(tmp_path / str(i), name, fake_context(each), settings).run() for i, each in enumerate(sources)]
    torch.testing.assert_close(found[0].values, found[1].values)


def test_the_costs_stand_to_each_other_as_published(tmp_path):
    """Scoring the pool by perplexity is a third of training on it, by LESS with one checkpoint all of it."""
    flops = {}
    for name in ("perplexity", "less"):
        cost = job(tmp_path / name, name).run().about["cost"]["flops"]
        flops[name] = cost["losses of candidates" if name == "perplexity" else "example gradients"]
    context = warm_context("adamw", source=planted()[0])
    rows = torch.arange(120).split(8)
    with flops_counted() as trained:
        for ids in rows:
            context.loss_fn(context.model, {"input_ids": context.source.tokens[ids]}).mean().backward()
    coordinates = sum(parameter.numel() for parameter in context.model.parameters())
    assert flops["perplexity"] / trained.total == pytest.approx(1 / 3, rel=0.05)
    # less what a projection and Adam's moments take
    gradients = flops["less"] - 10 * coordinates * 120
    assert gradients / trained.total == pytest.approx(1.0, rel=0.05)
    assert gradients / flops["perplexity"] == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize(
    "inner",
    [
        UniformSelector(),
        StratifiedSelector(),
        UCBSelector(probes=20),
        RegressionSelector(HashedRidgeRegressor(buckets=256), probes=20),
    ],
    ids=lambda each: type(each).__name__,
)
def test_scores_of_any_method_are_a_prior_of_any_selector(inner, every_score):
    unused, folders = every_score
    names = list(folders) if isinstance(inner, RegressionSelector) else list(folders)[:1]
    for name in names:
        folder = folders[name]
        source = copy.deepcopy(unused)
        prior = PriorSelector(copy.deepcopy(inner), folder, ratio=0.5)
        run = SelectionRun(prior, LossDropInfluence(steps=2), UniformSelector(), 0, source)
        plan = play(run, 20, warm_context("adamw", source=source))
        values = read_scores(folder).values
        allowed = values >= values.sort(descending=True).values[59]
        assert bool(allowed[plan.ids].all()), name


@pytest.fixture(scope="module")
def every_score(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every")
    groups = {"groups": torch.arange(120) % 3, "group_names": ("a", "b", "c")}
    source, _ = planted_source(candidates=120, share=0.25, length=24, vocab=50, rows=16, **groups)
    context = warm_context("adamw", source=source)
    for name in METHODS:
        job(folder / name, name, context).run()
    return source, {name: folder / name for name in METHODS}
