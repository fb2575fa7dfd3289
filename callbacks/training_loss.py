"""Whether the loss that selection measures is the one that is trained on."""

import math
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from liveselect import distributed
from liveselect.callbacks.session import Session
from liveselect.grammar import IGNORE_INDEX, Batch, LiveModel, SelectionWarning
from liveselect.losses import all_logits, causal_lm_loss, target_counts
from liveselect.preserve import measuring

_MOST_TRIES = 3  # batches that are looked at when none of them carries a loss
_DRAWS = 4  # of a model with dropout, whose spread says what two forwards may differ by
_SPREADS = 3.0
_SMOOTHINGS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
_MOST_CAUSED_BY_A_TERM = 0.25  # of the loss: a term beside it that large would be called something else
_MOVED = 0.2  # share by which the training loss must change before a comparison can tell right losses from wrong ones
_GROSS = 0.05  # share of the loss, and nats: what a later comparison allows, in which terms beside it may have grown


class TrainingLossCheck:
    """Compares ``loss_fn`` with what ``training_step`` returns for the first batch of a fit, before it is stepped on.

    Both see the same batch in training mode, with the random states with which the batch begins. A loss may be any mean
    or sum of those of the examples or of their tokens.

    A model that knows nothing yet gives all tokens about the same loss, whichever labels it is compared with. Until the
    training loss has moved, a batch of the last step of rounds 0, 1, 3, 7 and so on is therefore compared again, for
    gross differences only: what is found then is no reason to end a training, but nothing is measured any more.

    Args:
        differs: whether another loss is trained on deliberately, so that nothing is compared.
    """

    def __init__(self, differs: bool) -> None:
        self._differs = differs
        self._tries_left = 0
        self._repeats = False
        self._first_loss: float | None = None
        self._draws: list[Tensor] = []  # losses (B,) of the examples, once or, with dropout, several times
        self._batch: Batch = {}

    def begin_fit(self) -> None:
        """Compare in the fit that begins."""
        self._tries_left = 0 if self._differs else _MOST_TRIES
        self._repeats = not self._differs
        self._first_loss = None

    def begin(self, session: Session, batch: Batch) -> None:
        """Compute the losses of a batch, if it is to be compared; call before its forward."""
        run = session.run
        if self._repeats and not self._tries_left and session.begins_last_step:
            self._tries_left = int(not session.plan.round & (session.plan.round + 1))
        if not self._tries_left or run.estimator is None or run.disabled is not None:
            return
        self._batch = batch
        # ranks that hold parts of the parameters cannot compute more losses before a backward, if only some need them
        self._draws = self._drawn(session, _DRAWS if session.model.view.in_parts else 1)

    def compare(self, trainer: pl.Trainer, session: Session, loss: Tensor) -> None:
        """Compare with the loss of the training step, which was divided by the batches of an optimizer step.

        Raises:
            MisconfigurationException: it is no mean or sum of the losses, on any rank.
        """
        run = session.run
        if not self._tries_left or run.estimator is None or run.disabled is not None:
            return
        self._tries_left -= 1
        draws, batch = self._draws, self._batch
        self._draws, self._batch = [], {}
        counts = target_counts(batch).double().cpu() if draws else torch.zeros(1)
        total = sum(distributed.gather_objects(float(counts.sum()))) / distributed.world_size()
        value = float(loss.detach()) * trainer.accumulate_grad_batches
        least = 0.0 if self._first_loss is None else _GROSS
        found = self._judge(trainer, session.model, value, least, loss.dtype, draws, batch, counts, total)
        if found and len(draws) == 1:  # dropout may be drawn at another moment: the spread decides
            self._batch = batch
            draws += self._drawn(session, _DRAWS - 1)
            self._batch = {}
            found = self._judge(trainer, session.model, value, least, loss.dtype, draws, batch, counts, total)
        verdicts, losses = zip(*distributed.gather_objects((found, value)), strict=True)
        if all(verdict is None for verdict in verdicts):
            return
        self._tries_left = 0
        sentence = next((verdict for verdict in verdicts if verdict), None)
        if sentence is not None and self._first_loss is None:
            raise MisconfigurationException(sentence)
        if sentence is not None:
            run.disabled = f"{sentence}. Nothing is measured from now on"
            rank_zero_warn(run.disabled, category=SelectionWarning)
        self._first_loss = losses[0] if self._first_loss is None else self._first_loss
        if not abs(losses[0] - self._first_loss) <= _MOVED * abs(self._first_loss):
            self._repeats = False

    def _drawn(self, session: Session, count: int) -> list[Tensor]:
        """Return the losses ``(B,)`` of the batch: once, and up to ``count`` times where two computations differ."""
        draws: list[Tensor] = []
        with session.charged("rehearsal"), session.measuring():
            model = session.model
            try:
                with measuring(model.module, model.optimizer, training_mode=True), torch.no_grad(), model.autocast():
                    while len(draws) < count:
                        draws.append(model.losses(self._batch).detach().double().cpu())
                        if len(draws) == 2:
                            differ = not torch.equal(*draws)
                            if not (distributed.any_rank(differ) if model.view.in_parts else differ):
                                break
            except Exception:  # the batch is in a form that training_step alone knows: nothing can be compared
                return []
        return draws

    def _judge(
        self,
        trainer: pl.Trainer,
        model: LiveModel,
        loss: float,
        least: float,
        dtype: torch.dtype,
        draws: list[Tensor],
        batch: Batch,
        counts: Tensor,
        total: float,
    ) -> str | None:
        """Return what is wrong, an empty text for nothing, None where it cannot be said.

        ``least`` is the share by which losses may differ in any case, and as many nats.
        """
        if not draws:
            return None
        means = [_means(losses, counts, batch["input_ids"].shape[1], total) for losses in draws]
        if not counts.any() or not math.isfinite(loss) or not all(bool(losses.isfinite().all()) for losses in draws):
            return None
        share = max(least, _rounding_share(trainer, dtype))
        spread = max(each["over tokens"] for each in means) - min(each["over tokens"] for each in means)
        noise = max(share, _SPREADS * spread / max(1e-9, abs(means[0]["over tokens"])))
        for name in means[0]:
            drawn = [each[name] for each in means]
            if abs(drawn[0] - loss) <= noise * max(abs(loss), abs(drawn[0])) + least + 1e-9:
                return ""
        cause = _cause(model, batch, loss, means[0]["over tokens"], noise, trainer.accumulate_grad_batches)
        seen = "a batch of the last step of a round" if least else "the first batch"
        return (
            f"training_step returned the loss {loss:.6g} for {seen}, and selection computes "
            f"{means[0]['over tokens']:.6g} as the mean over its tokens, {means[0]['over examples']:.6g} over its "
            f"examples; no mean or sum of them is it. {cause}. Influence would be measured on another loss than the "
            "one that is trained on: pass loss_fn=(module, batch) -> (B,) losses of the examples as training_step "
            "takes them, or training_loss_differs=True if it is meant"
        )


def _means(losses: Tensor, counts: Tensor, width: int, total: float) -> dict[str, float]:
    """Return the means and sums that a training loss may be, of ``losses (B,)`` of ``counts (B,)`` tokens."""
    summed, rows = float(losses @ counts), len(losses)
    return {
        "over tokens": summed / max(1.0, float(counts.sum())),
        "over examples": float(losses.mean()),
        "over examples with targets": float(losses[counts > 0].mean()) if counts.any() else 0.0,
        "over the tokens of all ranks": summed / max(1.0, total),
        "over positions": summed / (rows * width),
        "over positions but the last": summed / max(1, rows * (width - 1)),
        "sum over tokens": summed,
        "sum over tokens, by example": summed / rows,
        "sum over examples": float(losses.sum()),
    }


def _rounding_share(trainer: pl.Trainer, dtype: torch.dtype) -> float:
    """Return the share by which two computations of one loss may differ."""
    if dtype.itemsize < 4:
        return 1e-2
    exact = trainer.precision in ("32-true", "64-true") and torch.get_float32_matmul_precision() == "highest"
    return 1e-4 if exact else 3e-3


def _cause(model: LiveModel, batch: Batch, loss: float, mean: float, noise: float, accumulated: int) -> str:
    """Return a sentence on the likely cause where a training loss differs from ``mean``."""
    known: dict[str, float] = {}
    if accumulated > 1:
        known[
            "training_step divides by accumulate_grad_batches, as Lightning does once more: leave the division out"
        ] = mean / accumulated
    known["training_step returns bits: return nats, or scale loss_fn alike"] = mean / math.log(2)
    if model.loss_fn is causal_lm_loss and not model.view.in_parts:
        try:
            with measuring(model.module, model.optimizer, training_mode=True), torch.no_grad(), model.autocast():
                known.update(_other_losses(all_logits(model.module, batch).float(), batch))
        except Exception:  # only looks for the cause of what is refused anyway
            known = dict(known)
    near = {text: abs(value - loss) for text, value in known.items() if math.isfinite(value)}
    likeliest = min(near, key=lambda text: near[text])
    if near[likeliest] <= max(noise, 1e-3) * abs(loss):
        return likeliest
    if mean < loss < mean * (1 + _MOST_CAUSED_BY_A_TERM):
        return (
            f"Likely training_step adds a term of {loss - mean:.3g} beside it (label smoothing, a z-loss, the balance "
            "of experts, a penalty), which influence would leave out"
        )
    return (
        "Likely they look at other positions or labels: training_step takes the last position only, labels that are "
        "shifted already, another index to ignore than -100, logits in another order than (B, T, V), or a factor"
    )


def _other_losses(logits: Tensor, batch: Batch) -> Iterator[tuple[str, float]]:
    """Yield what else ``logits (B, T, V)`` could have been compared with, and the mean loss that comes of it."""
    ids = batch["input_ids"]
    labels = batch.get("labels", ids)

    def mean(logits: Tensor, targets: Tensor, **settings: float) -> float:
        return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **settings))  # type: ignore[arg-type]

    before, after = logits[:, :-1], labels[:, 1:]
    same = "training_step compares logits with labels of the same position"
    yield (
        f"{same}: labels in the batch are shifted already, or none are; give labels that are the tokens",
        mean(logits, labels),
    )
    yield f"{same}, and leaves out the last one: give labels that are the tokens", mean(before, labels[:, :-1])
    yield "training_step takes the last position only", mean(logits[:, -2:-1], labels[:, -1:])
    yield (
        (
            "training_step counts tokens whose label is -100 as well, as padding or a prompt: leave them out there "
            "(ignore_index=-100), or in the labels of the data"
        ),
        mean(before, ids[:, 1:]),
    )
    for smoothing in _SMOOTHINGS:
        yield (
            f"training_step smooths labels (label_smoothing={smoothing:g})",
            mean(before, after, label_smoothing=smoothing),
        )
    common = int(ids.flatten().mode().values)
    for index in dict.fromkeys((0, 1, 2, int(ids[0, -1]), common)):
        left = after.masked_fill(after == index, IGNORE_INDEX)
        yield (
            (
                f"training_step ignores the token {index} (ignore_index), and the labels of the batch do not: give "
                "them -100 there"
            ),
            mean(before, left),
        )
