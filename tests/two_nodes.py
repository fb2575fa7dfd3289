"""One rank of a small run on two nodes, started by torchrun: ``two_nodes.py FOLDER STRATEGY NODES STOP CHECKPOINT``.

``STOP`` is the step at which the process is killed, 0 for never; ``CHECKPOINT`` is ``-`` for none.
"""

import json
import sys
from pathlib import Path

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_ranks import fit
from small_run import ROUND, die

from liveselect.callbacks import DataSelection
from liveselect.influence import OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

SAVED = ROUND + 1  # inside of the second round, which measures


class Dies(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            die()


def main() -> None:
    place, strategy, nodes, stop, checkpoint = sys.argv[1:]
    folder, nodes = Path(place), int(nodes)
    selector = RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None)
    selection = DataSelection(
        selector, OneStepInfluence(step="in_batch"), every_n_steps=ROUND, dirpath=folder / "selection"
    )
    saving = ModelCheckpoint(folder, every_n_train_steps=SAVED, save_top_k=-1, filename="{step}")
    found = fit(
        folder,
        selection,
        strategy,
        ranks=nodes,
        ckpt_path=None if checkpoint == "-" else checkpoint,
        callbacks=[saving, *([Dies(int(stop))] if int(stop) else [])],
        devices=1,
        num_nodes=nodes,
    )
    rank = selection.run.source.trainer.global_rank
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
