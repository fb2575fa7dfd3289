"""Select with a selector of your own: measure some candidates in each round, and train on the better half of them.

Run `python examples/own_selector.py --text texts --tokenizer gpt2`.
"""

import lightning.pytorch as pl
import torch
from train import Llama, Texts, arguments

from liveselect.callbacks import DataSelection, SelectionMonitor
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import NO_IDS, Selector
from liveselect.influence import FirstOrderInfluence


class BetterHalf(Selector):
    """Trains on the better half of what it measured, and fills the round up with other candidates."""

    needs_estimator = True

    def __init__(self, probes: int = 32) -> None:
        self.probes, self.ranked = probes, None

    def propose(self, round):
        if self.ranked is not None:  # one question a round
            return NO_IDS
        order = torch.randperm(len(round.candidates), generator=round.generator("probes"))
        return round.candidates[order[: self.probes]]

    def observe(self, ids, influence):
        self.ranked = ids[influence.argsort(descending=True)]

    def select(self, round, budget):
        ranked, self.ranked = self.ranked, None
        better = ranked[: len(ranked) // 2]
        others = round.candidates[~torch.isin(round.candidates, ranked)]
        order = torch.randperm(len(others), generator=round.generator("others"))
        return torch.cat([better, others[order], ranked[len(better) :]])[:budget]


def main():
    """Train."""
    options = arguments()
    data = Texts(options.text, options.tokenizer)
    selected = SelectionDataModule.wrap(data, reference=f"{options.text}/reference", overlap="drop")
    selection = DataSelection(BetterHalf(probes=32), FirstOrderInfluence(), every_n_steps=20)
    trainer = pl.Trainer(
        max_steps=options.steps,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        callbacks=[selection, SelectionMonitor()],
    )
    trainer.fit(Llama(len(data.tokenizer)), datamodule=selected)


if __name__ == "__main__":
    main()
