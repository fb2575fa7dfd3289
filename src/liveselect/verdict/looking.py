"""Look-aheads of a run: when one begins and ends, what was found so far, and what follows from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.grammar import CandidateSource, LiveModel, State
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.seeding import generator_for
from liveselect.verdict.answer import HELD_OUT, POOL, Answer, Block, Costs, Look, judge
from liveselect.verdict.arms import FORWARDS_PER_STEP, Sets, TrainingSteps, WeightAverage, losses_at, random_arm
from liveselect.verdict.sets import HalfReference, first_rows
from liveselect.verdict.settings import Verdict

AVERAGED_SHARE = 0.25
MOST_AVERAGED = 50


@dataclass
class Window:
    """The last steps of an arm, over which weights are averaged.

    Attributes:
        end: optimizer steps done after the last of them.
        average: of the weights so far.
        random: losses of the random arm by set, for the end of a look-ahead.
        before: the held-out loss earlier in the block, for the end of a block of rounds.
        block: of rounds that it belongs to, -1 for a look-ahead.
        begun: optimizer steps done when the arm, or the judged part of the block, began.
        rivals: held-out losses of the policies that training competes with, for the end of a contest; else None.
    """

    end: int
    average: WeightAverage
    begun: int
    random: dict[str, float] = field(default_factory=dict)
    before: float | None = None
    block: int = -1
    rivals: dict[str, float] | None = None

    @property
    def is_look(self) -> bool:
        """Whether it ends a look-ahead."""
        return self.block < 0 and self.rivals is None


class LookAhead:
    """The look-aheads of a run, and the verdict that follows from them.

    The engine calls :meth:`begin_round` when a round is chosen and :meth:`after_step` after each optimizer step.

    Args:
        settings: of the verdict.
        seed: of the run's selection.
        warmup_rounds: rounds at the beginning whose data are drawn uniformly anyway.
        every_n_steps: optimizer steps of a round.

    Attributes:
        looks: finished look-aheads.
        blocks: finished blocks of rounds, where they alternate.
        answer: the last verdict, None before the first look-ahead has ended.
        random_from: the first round that is drawn at random because selection does not pay; None for none.
        to_begin: the step at which a look-ahead was to begin when the run was interrupted, None for none.
        contest_to_begin: likewise of a contest.
        contests: those that have ended, with the held-out loss of training itself.
    """

    def __init__(self, settings: Verdict, seed: int, warmup_rounds: int, every_n_steps: int) -> None:
        self.settings, self._seed = settings, seed
        self._warmup_rounds, self._every_n_steps = warmup_rounds, every_n_steps
        self.forget()

    def forget(self) -> None:
        """Begin with nothing known."""
        self.looks: list[Look] = []
        self.blocks: list[Block] = []
        self.answer: Answer | None = None
        self.random_from: int | None = None
        self.to_begin: int | None = None
        self.contest_to_begin: int | None = None
        self.contests: list[tuple[Window, float]] = []
        self._windows: list[Window] = []
        self._spent = 0.0  # in training steps
        self._tokens = self._batches = 0
        self._sets: Sets | None = None

    # ---- what the rounds are ---------------------------------------------------------------------------------------

    def at_random(self, round_index: int) -> bool:
        """Return whether a round is drawn at random: by a coin, or because selection does not pay."""
        if self.random_from is not None and round_index >= self.random_from:
            return True
        block = self._block(round_index)
        return block is not None and self._is_random(block)

    def _block(self, round_index: int) -> int | None:
        if not self.settings.switchback or round_index < self._warmup_rounds:
            return None
        return (round_index - self._warmup_rounds) // self.settings.switchback

    def _is_random(self, block: int) -> bool:
        second = torch.rand((), generator=generator_for(self._seed, block // 2, "switchback")) < 0.5
        return block % 2 == int(second)

    # ---- a run -----------------------------------------------------------------------------------------------------

    def note_batch(self, tokens: int) -> None:
        """Count a training batch of this rank."""
        self._tokens, self._batches = self._tokens + tokens, self._batches + 1

    def is_due(self, round_index: int, step: int, total_steps: float, accumulate: int) -> bool:
        """Return whether a look-ahead begins with a round, at optimizer step ``step``, and what it costs is there."""
        if any(window.is_look for window in self._windows):
            return False
        length = self.settings.length(total_steps)
        rounds = range(round_index, round_index + -(-length // self._every_n_steps))
        if round_index < self._warmup_rounds or any(map(self.at_random, rounds)) or step + length > total_steps:
            return False
        return self._spent + self._price(length, accumulate) <= self.settings.share * step

    def begin(
        self,
        model: LiveModel,
        steps: TrainingSteps,
        source: CandidateSource,
        candidates: Tensor,
        round_index: int,
        step: int,
        total_steps: float,
    ) -> None:
        """Take the random arm of a look-ahead; training itself is the other.

        Args:
            model: the live model; its meter is charged.
            steps: how training takes its steps.
            source: the data.
            candidates: ``(n,)`` ids that random data are drawn from.
            round_index: of the round that begins.
            step: optimizer steps done.
            total_steps: of the run.

        Raises:
            RoundInterruptedError: a signal waits; ``to_begin`` says that the look-ahead is still to be taken.
        """
        length = self.settings.length(total_steps)
        averaged = averaged_steps(length)
        self.to_begin = step
        plan = Plan(round_index, random_ids(candidates, length * model.global_batch, self._seed, round_index))
        batches = source.training_batches(plan)
        if batches is None:
            raise ValueError(f"{type(source).__name__} serves no training batches apart from those of its plan")
        with model.meter.phase("look-ahead"):
            losses = random_arm(model, steps, batches, length, averaged, self.sets(source))
        self.to_begin = None
        self._windows.append(Window(step + length, WeightAverage(averaged), step, random=losses))
        self._spent += self._price(length, steps.accumulate)

    def begin_contest(
        self,
        model: LiveModel,
        steps: TrainingSteps,
        source: CandidateSource,
        contestants: Mapping[str, Tensor],
        round_index: int,
        step: int,
    ) -> None:
        """Let a copy of training follow each of some policies; training itself is one more.

        Args:
            model: the live model; its meter is charged.
            steps: how training takes its steps.
            source: the data.
            contestants: what each policy would train on, of equal numbers.
            round_index: of the round that begins.
            step: optimizer steps done.

        Raises:
            RoundInterruptedError: a signal waits; ``contest_to_begin`` says that the contest is still to be held.
        """
        self.contest_to_begin = step
        length = min(map(len, contestants.values())) // model.global_batch
        averaged, sets = averaged_steps(length), {HELD_OUT: self.sets(source)[HELD_OUT]}
        rivals = {}
        for name, ids in contestants.items():
            batches = source.training_batches(Plan(round_index, ids))
            if batches is None:
                raise ValueError(f"{type(source).__name__} serves no training batches apart from those of its plan")
            with model.meter.phase("contest"):
                rivals[name] = random_arm(model, steps, batches, length, averaged, sets)[HELD_OUT]
        self.contest_to_begin = None
        self._windows.append(Window(step + length, WeightAverage(averaged), step, rivals=rivals))

    def begin_block(self, round_index: int, step: int, total_steps: float) -> None:
        """Watch a block of rounds, if one begins with this round and ends before the run does."""
        block, rounds = self._block(round_index), self.settings.switchback
        if block is None or (round_index - self._warmup_rounds) % rounds or self.random_from is not None:
            return
        steps = rounds * self._every_n_steps
        faded = max(1, steps // 3)  # what the block before left in weights and moments
        averaged = averaged_steps(steps - faded)
        if step + steps <= total_steps:
            self._windows.append(Window(step + faded, WeightAverage(min(averaged, faded)), step + faded, block=block))

    def watches(self, step: int) -> bool:
        """Return whether the weights after optimizer step ``step`` belong to some average."""
        return any(step > window.end - window.average.count for window in self._windows)

    def after_step(self, model: LiveModel, source: CandidateSource, step: int) -> bool:
        """Add the weights of a step to the averages that it belongs to; returns whether a look-ahead or a block ended.

        ``step`` is the number of optimizer steps done.
        """
        ended = False
        for window in list(self._windows):
            if step > window.end - window.average.count:
                with model.meter.phase("look-ahead"):
                    window.average.add(model.module)
            if step < window.end:
                continue
            self._windows.remove(window)
            if window.average.added < window.average.count:
                continue  # a run that goes on elsewhere has missed steps of it
            with model.meter.phase("look-ahead"):
                losses = losses_at(model, window.average, self.sets(source))
            if window.rivals is not None:
                self.contests.append((window, losses[HELD_OUT]))
            elif window.is_look:
                self.looks.append(Look(window.begun, window.end - window.begun, losses, window.random))
                ended = True
            else:
                ended |= self._end_window(window, losses[HELD_OUT], step)
        return ended

    def _end_window(self, window: Window, loss: float, step: int) -> bool:
        """Note the loss at one of the two places of a block; returns whether the block has ended."""
        if window.before is None:
            steps = self.settings.switchback * self._every_n_steps
            end = window.begun - max(1, steps // 3) + steps
            average = WeightAverage(min(window.average.count, end - step))
            self._windows.append(Window(end, average, window.begun, before=loss, block=window.block))
            return False
        steps = window.end - window.begun
        self.blocks.append(Block(window.block, self._is_random(window.block), steps, window.before, loss))
        return True

    def judge(self, costs: Costs, step: int, total_steps: float, accumulate: int) -> Answer:
        """Give the verdict as it stands; it is kept as ``answer``. Ranks must pass equal costs."""
        spacing = self._price(self.settings.length(total_steps), accumulate) / self.settings.share
        self.answer = judge(self.looks, costs, step, spacing, total_steps, self.settings.error, self.blocks)
        return self.answer

    def looks_affordable(self, total_steps: float, accumulate: int) -> float:
        """Return how many look-aheads the run can afford."""
        length = self.settings.length(total_steps)
        return self.settings.share * total_steps / self._price(length, accumulate)

    def sets(self, source: CandidateSource) -> Sets:
        """Return what the arms are judged on."""
        if self._sets is None:
            held_out = HalfReference(source, self._seed, held_out=True)
            sets = {HELD_OUT: held_out.reference(), POOL: source.candidates(self._pool_sample(source.pool))}
            sets |= source.further_sets()
            self._sets = {name: first_rows(batches, self.settings.rows) for name, batches in sets.items()}
        return self._sets

    def _pool_sample(self, pool: CandidatePool) -> Tensor:
        count = min(pool.size, self.settings.rows)
        generator = generator_for(self._seed, 0, "the pool's own mixture")
        return torch.randint(pool.size, (2 * count,), generator=generator).unique()[:count]

    def _price(self, length: int, accumulate: int) -> float:
        """Return what a look-ahead costs, in training steps: its own, and judging both arms."""
        per_step = accumulate * distributed.world_size() * self._tokens / max(1, self._batches)
        judged = sum(batch["input_ids"].numel() for batches in (self._sets or {}).values() for batch in batches)
        return length + 2 * judged / (FORWARDS_PER_STEP * per_step) if per_step else float(length)

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return all of it as tensors and builtins."""
        return {
            "looks": [asdict(look) for look in self.looks],
            "blocks": [asdict(block) for block in self.blocks],
            "answer": None if self.answer is None else asdict(self.answer),
            "random_from": self.random_from,
            "to_begin": self.to_begin,
            "contest_to_begin": self.contest_to_begin,
            "windows": [
                {
                    "end": window.end,
                    "begun": window.begun,
                    "random": dict(window.random),
                    "before": window.before,
                    "block": window.block,
                    "rivals": None if window.rivals is None else dict(window.rivals),
                    "count": window.average.count,
                    "added": window.average.added,
                    "sums": [total.clone() for total in window.average.sums],
                }
                for window in self._windows
            ],
            "spent": self._spent,
            "tokens": self._tokens,
            "batches": self._batches,
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.forget()
        self.looks = [Look(**look) for look in state["looks"]]
        self.blocks = [Block(**block) for block in state["blocks"]]
        self.answer = None if state["answer"] is None else Answer(**state["answer"])
        self.random_from, self.to_begin = state["random_from"], state["to_begin"]
        self.contest_to_begin = state["contest_to_begin"]
        for window in state["windows"]:
            average = WeightAverage(window["count"], window["sums"], window["added"])
            kept = {name: window[name] for name in ("end", "begun", "random", "before", "block", "rivals")}
            self._windows.append(Window(average=average, **kept))
        self._spent, self._tokens, self._batches = state["spent"], state["tokens"], state["batches"]


def averaged_steps(length: int) -> int:
    """Return over how many of its last steps the weights of an arm are averaged."""
    return max(1, min(MOST_AVERAGED, int(AVERAGED_SHARE * length)))


def random_ids(candidates: Tensor, count: int, seed: int, round_index: int) -> Tensor:
    """Draw ``count`` of ``candidates (n,)`` uniformly, ``(count,)``; none twice before all were drawn once."""
    generator = generator_for(seed, round_index, "the random arm of a look-ahead")
    drawn: list[Tensor] = []
    missing = count
    while missing > 0:
        drawn.append(candidates[torch.randperm(len(candidates), generator=generator)[:missing]])
        missing -= len(drawn[-1])
    return torch.cat(drawn)
