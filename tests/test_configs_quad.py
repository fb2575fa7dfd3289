"""The files of Quad: equal to their Python form."""

from pathlib import Path

from test_configs import callback_of, from_yaml, told, without_a_network  # noqa: F401 - a fixture

from liveselect.callbacks import Quad
from liveselect.cli.demo_runs import CLUSTERS
from liveselect.cli.model import CausalLM
from liveselect.datamodules import ReferenceSet, SelectionDataModule
from liveselect.influence import KFACInfluence


def test_quad_in_python_is_quad_in_yaml():
    cli = from_yaml("quad.yaml")
    select = Quad(
        every_n_steps=20,
        warmup_rounds=25,
        alpha=0.5,
        pulls=8,
        at_once=8,
        probes=8,
        controls=16,
        arms=16,
        gamma=0.05,
        tau=0.0,
        discount=0.999,
        cutoff=0.2,
        estimator=KFACInfluence(factors_of="candidates", factor_examples=128, factors_every=10),
        seed=0,
    )
    lambada = ReferenceSet(
        "hub:EleutherAI/lambada_openai:default:test", answer="last_word", max_examples=266, seed=1234
    )
    data = SelectionDataModule(
        pool="pools/dsdm-candidate-c4", reference=lambada, groups="clusters", batch_size=16, num_workers=2
    )
    model = CausalLM("EleutherAI/pythia-410m", overrides={"max_position_embeddings": 1024}, lr=1e-3, warmup_steps=2000)
    assert told(callback_of(cli)) == told(select)
    assert told(cli.datamodule) == told(data)
    assert told(cli.model) == told(model)


def test_the_demo_of_quad_differs_from_that_of_mates_in_selection_and_groups_alone():
    quad, mates = from_yaml("demo.yaml", "demo_quad.yaml"), from_yaml("demo.yaml", "demo_mates.yaml")
    assert told(quad.model) == told(mates.model)
    data, expected = told(quad.datamodule), told(mates.datamodule)
    assert {key for key in data if data[key] != expected[key]} == {"settings"}
    assert data["settings"] == {**expected["settings"], "groups": "clusters"} != expected["settings"]
    select = callback_of(quad)
    assert isinstance(select, Quad)
    # every arm is pulled several times in the run, and long before it is forgotten
    rounds = quad.trainer.max_steps / select.every_n_steps
    sweep = CLUSTERS / select.selector.pulls
    assert 4 * sweep <= rounds
    assert 1 / (1 - select.selector.discount) >= 4 * sweep


def test_the_number_of_clusters_that_the_files_name_is_that_of_the_demo():
    text = (Path(__file__).parents[1] / "configs" / "demo_quad.yaml").read_text(encoding="utf-8")
    assert f"--clusters {CLUSTERS}" in text
