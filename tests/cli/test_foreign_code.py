"""No file of a run, a pool or a tokenizer decides which code runs, without being named by the user."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
from small_run import SIMPLE, SmallLM, small_data, small_trainer

import liveselect
from liveselect import cli
from liveselect.callbacks import DataSelection
from liveselect.cli.model import build_model
from liveselect.cli.replay import own_config
from liveselect.datamodules.clusters.embedding import _mean_state
from liveselect.datamodules.pools.readers import DataError
from liveselect.datamodules.pools.tokenizers import load_tokenizer
from liveselect.decisions import find_decisions
from liveselect.regressors.encoder_model import encoder_config
from liveselect.selectors import UniformSelector


@pytest.fixture(scope="module")
def run_without_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs") / "project" / "version_0"
    select = DataSelection(UniformSelector(), every_n_steps=2, dirpath=folder / "selection")
    small_trainer(folder, [select], max_steps=2, **SIMPLE).fit(SmallLM(0.0), datamodule=small_data())
    return folder


@pytest.mark.parametrize("levels", [1, 2])
def test_a_replay_takes_no_config_of_a_folder_above_the_run(run_without_config, levels, tmp_path, capsys):
    above = run_without_config.parents[levels - 1] / "config.yaml"
    above.write_text("model: {class_path: planted.Model}\n")
    try:
        assert cli.main(["replay", str(run_without_config), "--out", str(tmp_path)]) == 1
    finally:
        above.unlink()
    assert "there is no config.yaml beside" in capsys.readouterr().err
    assert "planted" not in sys.modules


def test_a_replay_takes_the_config_of_the_run_however_the_run_is_named(run_without_config):
    own = run_without_config / "config.yaml"
    own.write_text("")
    try:
        for name in ("", "selection", "selection/decisions", "selection/ledger.jsonl"):
            named = run_without_config / name
            assert own_config(find_decisions(named), named) == own.resolve()
    finally:
        own.unlink()


@pytest.fixture
def folder_with_code(tmp_path):
    """A folder of a tokenizer and a model whose classes are code beside them."""
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the folder was run')\n")
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    config = {"model_type": "evil", "auto_map": {**names, "AutoTokenizer": ["evil.Tokenizer", None]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    auto = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto))
    return str(tmp_path)


@pytest.fixture
def nobody_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    yield
    assert not asked


@pytest.mark.usefixtures("nobody_is_asked")
def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(folder_with_code):
    with pytest.raises(DataError, match="custom code"):
        load_tokenizer(folder_with_code)


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_model_with_code_of_its_own_is_refused_without_a_question(folder_with_code, pretrained):
    with pytest.raises(ValueError, match="custom code"):
        build_model(folder_with_code, {}, pretrained, 0)
    with pytest.raises(ValueError, match="runs no code that comes with a model"):
        build_model(folder_with_code, {"trust_remote_code": True}, pretrained, 0)


@pytest.mark.usefixtures("nobody_is_asked")
def test_an_encoder_with_code_of_its_own_is_refused_without_a_question(folder_with_code):
    with pytest.raises(ValueError, match="custom code"):
        encoder_config(folder_with_code)
    with pytest.raises(ValueError, match="custom code"):
        _mean_state(folder_with_code, "cpu")


LOADS_A_FOLDER = {"from_pretrained", "from_config", "SentenceTransformer"}
LOADS_NO_CODE = {"StaticModel", "_static_model"}
"""Their folders hold vectors only."""


def test_no_line_of_the_product_leaves_open_whether_code_of_a_folder_is_run():
    walked = os.walk(Path(liveselect.__file__).parent, followlinks=True)  # callbacks and datamodules are links
    found = 0
    for path in (Path(folder, name) for folder, _, names in walked for name in names if name.endswith(".py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name not in LOADS_A_FOLDER or any(each in ast.unparse(call.func) for each in LOADS_NO_CODE):
                continue
            found += 1
            said = {each.arg: ast.unparse(each.value) for each in call.keywords}
            assert said.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
    assert found >= 8
