"""Less common ways of sharding a model: compiled layers, recomputed activations, copies of a group of shards (HSDP)."""

import json

import pytest
import torch
from lightning_ranks import DoubleLM, ShardedLM, batches, fit, on_lightning_ranks
from sampling import chosen, mostly_slow
from small_run import ProbingUniform
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from liveselect.callbacks import DataSelection
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

GLOBAL_BATCH, STEPS = 4, 4


class CompiledLM(ShardedLM):
    """Its layers are compiled before they are sharded."""

    def configure_model(self):
        for layer in self.model.gpt_neox.layers:
            layer.compile(backend="aot_eager")
        super().configure_model()


class RecomputedLM(ShardedLM):
    """Recomputes the activations of its layers in backward."""

    def configure_model(self):
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        super().configure_model()


class HybridLM(DoubleLM):
    """Sharded over two ranks, with a copy on two others."""

    def configure_model(self):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        for layer in self.model.gpt_neox.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


# module, ranks, and the estimators of the two comparisons: those that look at layers, and those that move weights
VARIANTS = {
    "compiled": (CompiledLM, 2, ("one step", "K-FAC"), ("K-FAC",)),
    "recomputed": (RecomputedLM, 2, ("first order",), ("central difference",)),
    "hybrid": (HybridLM, 4, ("K-FAC",), ("one step",)),
}
CHOSEN = [(variant, name) for variant, (_, _, names, _) in VARIANTS.items() for name in names]
MEASURED = [(variant, name) for variant, (*_, names) in VARIANTS.items() for name in names]
TESTS = (
    "test_a_variant_measures_chooses_and_trains_on_what_one_process_does",
    "test_training_with_measuring_equals_training_without",
)
ESTIMATORS = {
    "one step": OneStepInfluence,
    "first order": FirstOrderInfluence,
    "central difference": lambda: FirstOrderInfluence("central_difference"),
    "K-FAC": lambda: KFACInfluence(factor_examples=9),
}


def _trained(folder, selector, estimator, ranks=1, module=None, **settings) -> dict:
    selection = DataSelection(selector, estimator, every_n_steps=2, warmup_rounds=0, dirpath=folder / "selection")
    strategy = {"strategy": "fsdp2", "ranks": ranks, "module": module} if module else {}
    return fit(folder, selection, **strategy, batch=GLOBAL_BATCH, max_steps=STEPS, **settings)


def _chosen(folder, names, ranks=1, module=None) -> dict:
    found = {}
    for name in names:
        selector = RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)
        found[name] = _trained(folder / name, selector, ESTIMATORS[name](), ranks, module)
    return found


def _all(folder, variant, names, measured) -> dict:
    module, ranks, *_ = VARIANTS[variant]
    found = {"chosen": _chosen(folder / "chosen", names, ranks, module), "on": {}}
    if measured:
        found["off"] = _trained(folder / "off", UniformSelector(), None, ranks, module, dropout=0.1)["steps"]
    for name in measured:
        run = _trained(folder / "on" / name, ProbingUniform(), ESTIMATORS[name](), ranks, module, dropout=0.1)
        found["on"][name] = run["steps"]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    torch.set_num_threads(1)
    return json.loads(json.dumps(_chosen(tmp_path_factory.mktemp("alone"), ("one step", "first order", "K-FAC"))))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    torch.set_num_threads(1)
    folder, found = tmp_path_factory.mktemp("variants"), {}
    for variant, (_, ranks, *_) in VARIANTS.items():
        asked = [
            sorted(name for each, name in chosen(request, test, "variant", "name") if each == variant) for test in TESTS
        ]
        if any(asked):
            found[variant] = on_lightning_ranks(_all, ranks, folder / variant, variant, *asked)
    return found


@pytest.mark.parametrize(
    ("variant", "name"),
    mostly_slow(CHOSEN, [("compiled", "K-FAC"), ("recomputed", "first order"), ("hybrid", "K-FAC")]),
)
def test_a_variant_measures_chooses_and_trains_on_what_one_process_does(runs, alone, variant, name):
    found = [rank["chosen"][name] for rank in runs[variant]]
    assert batches(found) == batches([alone[name]])
    for rank in found:
        for (plan, measured, influence), expected in zip(rank["rounds"], alone[name]["rounds"], strict=True):
            assert [plan, measured] == expected[:2]
            torch.testing.assert_close(torch.tensor(influence), torch.tensor(expected[2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("variant", "name"), mostly_slow(MEASURED, [("recomputed", "central difference")]))
def test_training_with_measuring_equals_training_without(runs, variant, name):
    for rank in runs[variant]:
        assert rank["on"][name] == rank["off"]
