"""The how-to pages run as they stand: a selector, an estimator, a regressor and a preset of one's own."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from fakes import fake_context, play, random_source
from probing import candidate_batch, tiny_model
from small_run import SmallLM, rows, small_trainer

from liveselect.cli.fit import SelectionCLI
from liveselect.datamodules import SelectionDataModule
from liveselect.influence import FirstOrderInfluence
from liveselect.rounds import SelectionRun
from liveselect.selectors import UniformSelector

ROOT = Path(__file__).parents[1]
SIMPLE = {"accumulate_grad_batches": 1, "max_steps": 6, "limit_val_batches": 0, "val_check_interval": None}


def code_of(page, language="python"):
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def names_of(page):
    """Run the code of a page; every block sees those before it."""
    names = {}
    for block in code_of(page):
        exec(block, names)
    return names


def train(selection, folder):
    selection.dirpath, selection.every_n_steps, selection.warmup_rounds = folder, 2, 1
    data = SelectionDataModule(pool=rows(80, seed=0), reference=rows(6, seed=3), batch_size=4)
    small_trainer(folder, [selection], **SIMPLE).fit(SmallLM(), datamodule=data)
    return selection.run


def test_a_selector_of_ones_own_keeps_the_rules_that_it_does_not_know(tmp_path):
    names = names_of("selector")
    source = random_source(candidates=10)
    run = SelectionRun(names["LowestIds"](), None, UniformSelector(), 0, source)
    for _ in range(9):
        play(run, 4)
        assert int(source.pool.uses.max() - source.pool.uses.min()) <= 1
    measured = train(names["selection"], tmp_path).ledger.rounds
    assert [len(record.measured) for record in measured] == [0, 24, 24]


def test_an_estimator_of_ones_own_measures_the_product_of_gradients(tmp_path):
    names = names_of("estimator")
    assert len(code_of("estimator")[0].splitlines()) <= 60
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # whose preconditioner is the identity
    context = fake_context(random_source(), model=model, optimizer=optimizer)
    own = names["GradientMatch"]()
    reference = FirstOrderInfluence(gradient_at="current", step="in_batch")
    for estimator in (own, reference):
        context.fit(estimator)
    batch = candidate_batch(context, 6)
    torch.testing.assert_close(context.score(own, batch), context.score(reference, batch), rtol=1e-3, atol=1e-6)
    assert all(len(record.measured) == 64 for record in train(names["selection"], tmp_path).ledger.rounds[1:])


def test_a_regressor_of_ones_own_learns_what_it_can_see(tmp_path):
    names = names_of("regressor")
    tokens = torch.stack([torch.arange(12) % (1 + i % 11) for i in range(64)])
    context = fake_context(random_source())
    context.source.tokens = context.source.labels = tokens
    distinct = torch.tensor([len(row.unique()) for row in tokens], dtype=torch.float32)
    own = names["Diversity"]()
    assert own.fit(context.round, torch.arange(64), 3.0 * distinct)["spearman"] == pytest.approx(1.0)
    predicted = torch.cat([own.predict(context.round, batch) for batch in context.round.batches(torch.arange(64))])
    torch.testing.assert_close(predicted, 3.0 * distinct)
    resumed = names["Diversity"]()
    resumed.load_state_dict(own.state_dict())
    assert (resumed.slope, resumed.intercept) == (own.slope, own.intercept)
    assert len(train(names["mates"], tmp_path).ledger.rounds) == 3


def test_a_preset_of_ones_own_runs_and_is_named_in_the_ledger(tmp_path):
    run = train(names_of("preset")["cheap"], tmp_path)
    assert run.ledger.about["preset"] == "Cheap"
    assert run.seed == 1
    assert all(len(record.measured) == 32 for record in run.ledger.rounds[1:])


@pytest.mark.parametrize(("page", "module"), [("selector", "my_selectors"), ("preset", "my_presets")])
def test_parts_of_ones_own_are_named_in_a_configuration_file(page, module, tmp_path, monkeypatch):
    (tmp_path / f"{module}.py").write_text("\n".join(code_of(page)))
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {
        "model": {"class_path": "small_run.SmallLM"},
        "data": {
            "class_path": "liveselect.datamodules.SelectionDataModule",
            "init_args": {"pool": "pool", "reference": "reference", "batch_size": 4},
        },
        **yaml.safe_load(code_of(page, "yaml")[0]),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    callbacks = SelectionCLI([f"--config={tmp_path / 'run.yaml'}"], run=False).trainer.callbacks
    if page == "selector":
        (selection,) = [each for each in callbacks if type(each).__name__ == "DataSelection"]
        assert (type(selection.selector).__name__, selection.selector.probes) == ("BestOfThreeQuestions", 16)
    else:
        (selection,) = [each for each in callbacks if type(each).__name__ == "Cheap"]
        assert (selection.selector.probes, selection.seed) == (32, 1)
