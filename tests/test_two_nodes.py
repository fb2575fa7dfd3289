"""Two nodes are two agents of torchrun; a run that is killed on both goes on with one, with the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning_ranks import batches
from ranks import free_port
from two_nodes import SAVED

SCRIPT = Path(__file__).with_name("two_nodes.py")


def start(folder, strategy, nodes, stop=0, checkpoint="-"):
    """Run the script on some nodes; return their exit codes."""
    folder.mkdir(exist_ok=True)
    port, paths = str(free_port()), [str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    agents = []
    for node in range(nodes):
        launch = ["-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", "1"]
        launch += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port]
        arguments = [str(folder), strategy, str(nodes), str(stop), str(checkpoint)]
        with open(folder / f"node-{node}.log", "w") as log:
            command = [sys.executable, *launch, str(SCRIPT), *arguments]
            agents.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return [agent.wait(timeout=240) for agent in agents]


def found(folder, nodes):
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(nodes)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_on_two_nodes_that_is_killed_goes_on_with_one(tmp_path, strategy):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole, strategy, 2) == [0, 0], (whole / "node-0.log").read_text()[-3000:]
    assert all(start(cut, strategy, 2, stop=SAVED))
    assert not (cut / "found-0.json").exists()
    rest = start(cut, strategy, 1, checkpoint=cut / f"step={SAVED}.ckpt")
    assert rest == [0], (cut / "node-0.log").read_text()[-3000:]
    undisturbed, resumed = found(whole, 2), found(cut, 1)
    assert undisturbed[0]["rounds"] == undisturbed[1]["rounds"]
    expected = [sorted(ids) for ids in batches(undisturbed)]
    after = [sorted(ids) for ids in batches(resumed)]
    assert after
    assert after == expected[-len(after) :]
    assert [plan for plan, *_ in resumed[0]["rounds"]] == [plan for plan, *_ in undisturbed[0]["rounds"]]
