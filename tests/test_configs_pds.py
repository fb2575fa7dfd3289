"""The files of PDS: equal to their Python form, and read by `liveselect score` as they are."""

import re

from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from test_configs import CONFIGS, callback_of, from_yaml, told, without_a_network  # noqa: F401 - a fixture

from liveselect.callbacks import PDS
from liveselect.cli import score
from liveselect.cli.model import CausalLM
from liveselect.datamodules import ReferenceSet, SelectionDataModule
from liveselect.influence import OneStepInfluence
from liveselect.selectors import PriorSelector, RegressionSelector, UniformSelector


def test_pds_in_python_is_pds_in_yaml():
    cli = from_yaml("pds.yaml")
    network = {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 1024,
    }
    assert cli.config.model.init_args.config == network
    select = PDS("scores/pds-160m", every_n_steps=1000, ratio=0.4, temperature=0.1, seed=0)
    data = SelectionDataModule(
        pool="pools/redpajama-cc",
        batch_size=16,
        num_workers=2,
        reference=ReferenceSet("data/lima.jsonl", max_length=1024),
    )
    assert told(callback_of(cli)) == told(select)
    assert told(cli.datamodule) == told(data)
    kinds = {type(callback) for callback in cli.trainer.callbacks}
    assert {ModelCheckpoint, LearningRateMonitor, PDS} <= kinds
    assert (cli.model.lr, cli.model.betas, cli.model.weight_decay) == (3e-4, (0.9, 0.98), 0.01)


def test_the_proxy_trains_on_random_data_and_is_what_the_scores_are_made_with():
    cli = from_yaml("pds.yaml", "pds_proxy.yaml")
    assert isinstance(callback_of(cli).selector, UniformSelector)
    assert cli.trainer.max_steps == 10_000
    files = [f"--config={CONFIGS / name}" for name in ("pds.yaml", "pds_proxy.yaml")]
    config = score.parser().parse_args([*files, "--out=scores/pds-160m", "--ckpt_path=last.ckpt"])
    assert config.model.as_dict() == cli.config.model.as_dict()
    assert config.data.as_dict() == cli.config.data.as_dict()
    assert (config.probes, config.trainer.gradient_clip_val) == (163_840, 1.0)
    assert isinstance(score.instantiated(score.parser(), config).model, CausalLM)


def test_the_prior_that_the_document_shows_can_be_built(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", (CONFIGS.parent / "docs" / "pds.md").read_text(), re.DOTALL)
    (tmp_path / "prior.yaml").write_text(block)
    callback = callback_of(from_yaml("pds.yaml", str(tmp_path / "prior.yaml")))
    assert isinstance(callback.selector, PriorSelector)
    assert isinstance(callback.selector.selector, RegressionSelector)
    assert isinstance(callback.estimator, OneStepInfluence)
