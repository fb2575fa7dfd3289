"""Mistakes in what is handed to a Trainer are answered in the words of the one who made them."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_run import SIMPLE, SmallLM, small_data, small_trainer

from liveselect import cli
from liveselect.callbacks import MATES, DataSelection, Quad, SelectionMonitor
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import CandidateSource
from liveselect.influence import KFACInfluence, OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

SETTINGS = {**SIMPLE, "max_steps": 2}


def mates() -> MATES:
    return MATES(probes=8, regressor=HashedRidgeRegressor())


def refusal(folder, callbacks, error=MisconfigurationException, module=None, data=None) -> str:
    with pytest.raises(error) as caught:
        small_trainer(folder, callbacks, **SETTINGS).fit(module or SmallLM(), datamodule=data or small_data())
    return str(caught.value)


TWO = "expected one selection in a Trainer, got {} and {}: they would choose the same batches. Keep one of them"


def test_two_selections_in_one_trainer_are_named(tmp_path):
    assert TWO.format("MATES", "Quad") in refusal(tmp_path, [mates(), Quad()])
    assert TWO.format("Quad", "Quad") in refusal(tmp_path, [Quad(), Quad()])
    assert TWO.format("DataSelection", "MATES") in refusal(tmp_path, [DataSelection(UniformSelector()), mates()])


def test_a_second_one_that_the_module_brings_is_named_too(tmp_path):
    class Brings(SmallLM):
        def configure_callbacks(self):
            return [Quad()]

    assert TWO.format("MATES", "Quad") in refusal(tmp_path, [mates()], module=Brings())


def test_a_selection_under_select_and_another_among_the_callbacks_are_named_before_data_are_read(tmp_path, capsys):
    config = tmp_path / "two.yaml"
    config.write_text("""
select: {class_path: liveselect.callbacks.Quad}
trainer: {accelerator: cpu, logger: false, callbacks: [{class_path: liveselect.callbacks.PDS, init_args: {scores: x}}]}
model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}
data: {class_path: liveselect.datamodules.SelectionDataModule, init_args: {pool: nowhere, reference: x, batch_size: 2}}
""")
    assert cli.main(["fit", f"--config={config}"]) == 1
    assert TWO.format("PDS", "Quad") in capsys.readouterr().err


def test_a_datamodule_that_is_passed_as_a_class_is_answered_with_what_to_write(tmp_path):
    written = refusal(tmp_path, [mates()], TypeError, data=SelectionDataModule)
    assert "expected the datamodule of the Trainer to be an object, got the class: write datamodule=" in written
    with pytest.raises(TypeError, match=r"the datamodule to wrap to be an object, got the class Any: pass Any\(...\)"):
        SelectionDataModule.wrap(type("Any", (LightningDataModule,), {}), [])
    for name in ("pool", "reference"):
        with pytest.raises(ValueError, match=f"expected a {name}, got None"):
            SelectionDataModule(**{"pool": [], "reference": [], "batch_size": 2, name: None})


def test_a_prior_ratio_is_checked_whether_there_is_a_prior_or_not():
    with pytest.raises(ValueError, match=r"expected prior_ratio, the share that the prior keeps, .* got 50"):
        Quad(prior_ratio=50)


def test_a_single_selection_is_saved_under_the_one_key_as_before(tmp_path):
    trainer = small_trainer(tmp_path, [mates()], **SETTINGS)
    trainer.fit(SmallLM(), datamodule=small_data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["callbacks"]["DataSelection"]["run"]["plan"]["round"] == 0


@pytest.mark.parametrize("kind", [MATES, Quad, SelectionMonitor])
def test_a_callback_without_parentheses_is_named(tmp_path, kind):
    callbacks = [kind] if kind is not SelectionMonitor else [mates(), kind]
    name = kind.__name__
    assert refusal(tmp_path, callbacks, TypeError) == (
        f"expected objects among the callbacks of the Trainer, got the class {name}: write {name}(...)"
    )


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: DataSelection(UniformSelector), "UniformSelector"),
        (lambda: DataSelection(UniformSelector(), OneStepInfluence), "OneStepInfluence"),
        (lambda: Quad(estimator=KFACInfluence), "KFACInfluence"),
        (lambda: MATES(regressor=HashedRidgeRegressor), "HashedRidgeRegressor"),
        (lambda: RegressionSelector(HashedRidgeRegressor), "HashedRidgeRegressor"),
    ],
)
def test_a_part_without_parentheses_is_named(build, name):
    with pytest.raises(TypeError, match=rf"got the class {name}: pass {name}\(\.\.\.\)$"):
        build()


def test_a_source_with_a_misspelt_method_is_refused_by_a_trainer_too(tmp_path):
    data = small_data()
    data.__class__ = type("Mine", (type(data),), {"decodes": lambda self, ids: []})
    assert issubclass(type(data), CandidateSource)
    assert "Mine.decodes is never used: CandidateSource has no decodes" in refusal(
        tmp_path, [mates()], TypeError, data=data
    )
