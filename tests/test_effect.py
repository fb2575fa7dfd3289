"""The benchmark of effect on a very small scale: its texts are apart, and its arms run."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "effect.py"
MEGABYTES = 0.5


@pytest.fixture(scope="module")
def effect():
    spec = importlib.util.spec_from_file_location("effect", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CONFIG = copy.deepcopy(module.CONFIG)
    module.VOCABULARY = 400
    network = module.CONFIG["model"]["init_args"]["config"]
    network |= {"vocab_size": 400, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16}
    data = module.CONFIG["data"]["init_args"]
    data["batch_size"], data["reference"]["max_examples"], data["validation"]["max_examples"] = 4, 16, 8
    return module


@pytest.fixture(scope="module")
def folder(effect, tmp_path_factory):
    out = tmp_path_factory.mktemp("effect")
    size = ["--megabytes", str(MEGABYTES), "--processes", "1", "--out", str(out)]
    status = effect.main(
        [*size, "--steps", "5", "--seeds", "0", "--arms", "random", "default", "--targets", "words", "blind"]
    )
    assert status == 0
    return out


def texts(folder, pattern):
    found = sorted(folder.glob(f"texts-reporting/{pattern}.jsonl"))
    return [json.loads(line)["text"] for path in found for line in path.read_text().splitlines()]


@pytest.mark.long
def test_every_target_is_judged_for_every_arm(folder):
    rows = json.loads((folder / "reporting" / "comparison.json").read_text())
    names = [(row["task"], row["method"]) for row in rows]
    assert names == [(task, arm) for task in ("words", "blind") for arm in ("random", "default")]
    for row in rows:
        assert {"averaged_val_loss", "averaged_mixture_loss", "averaged_elsewhere_loss"} <= set(row["differences"])


@pytest.mark.long
def test_what_is_held_out_stands_nowhere_in_the_pool(folder):
    pool = "\n\n".join(texts(folder, "*-code") + texts(folder, "*-docstrings") + texts(folder, "*-comments"))
    for target in ("words", "far", "blind"):
        held_out = [texts(folder, f"{target}-{part}") for part in ("reference", "validation")]
        assert all(held_out), target
        for text in [text for part in held_out for text in part]:
            assert text not in pool
        assert not set(held_out[0]) & set(held_out[1])


@pytest.mark.long
def test_the_halves_share_no_package_and_every_arm_has_settings_that_exist(effect, tmp_path):
    assert not set(effect.HALVES["tuning"]) & set(effect.HALVES["reporting"])
    assert set(effect.SHORT) < {arm.name for arm in effect.ARMS}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(effect.CONFIG))
    from liveselect.cli.compare_runs import Comparison
    from liveselect.cli.fit import SelectionCLI

    for run in Comparison(tmp_path, [config], effect.ARMS, [effect.task("far", tmp_path)]).runs():
        path = tmp_path / f"{run.folder.name}.yaml"
        path.write_text(yaml.safe_dump(run.config))
        SelectionCLI([f"--config={path}"], run=False)
