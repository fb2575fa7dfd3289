"""Ledgers as runs of a few steps would leave them."""

import torch

from liveselect.ledger import Example, Histogram, Ledger, RoundRecord


def ledger_of(selector: str, losses: list[float], round_seconds: float = 0.0, text: str = "some words") -> Ledger:
    """Return the ledger of a run with a round of 10 steps before each loss; a training step costs 1 s and 100 FLOPs."""
    ledger = Ledger(about={"preset": "DataSelection", "selector": selector, "seed": 3, "nested": {"ratio": 0.25}})
    scores = torch.arange(8.0)
    for index, loss in enumerate(losses):
        drawn = selector == "UniformSelector"
        ledger.rounds.append(
            RoundRecord(
                round=index,
                step=10 * index,
                selector=selector,
                candidates=1000 - index,
                chosen=40,
                plan=f"plan{index}",
                measured=[] if drawn else [1, 2, 3],
                influence=[] if drawn else [-0.25, 0.5, 1.0 + index],
                groups={
                    "prose": {"available": 750 - index, "measured": 2, "chosen": 10 + index},
                    "code": {"available": 250, "measured": 1, "chosen": 30 - index},
                },
                histogram=None if drawn else Histogram.of(scores, scores > 4, bins=4),
                examples=[
                    Example(index, "prose", None if drawn else 7.0, True, text),
                    Example(index + 500, "code", None if drawn else -1.5, False, "a rejected text"),
                ],
                metrics={} if drawn else {"reference_loss": 3.5 + index, "regressor/spearman": 0.5 + index / 8},
                seconds={"choose": round_seconds},
                flops={"choose": 100 * round_seconds},
            )
        )
        ledger.training_seconds += 10.0
        ledger.training_flops += 1000.0
        ledger.evaluate(10 * (index + 1), {"val_loss": loss, "train_loss": loss + 1})
    return ledger
