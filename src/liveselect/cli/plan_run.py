"""The trial of a configuration, and what is planned from it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ProgressBar,
)

from liveselect.callbacks import DataSelection, SelectionMonitor
from liveselect.cli.fit import SelectionCLI
from liveselect.cli.plan_forecast import (
    AnswerExpected,
    MethodCost,
    Recommendation,
    Trial,
    answer_expected,
    builtins,
    check_proxy,
    recommend,
)
from liveselect.cli.plan_trial import PlanTrial
from liveselect.verdict import Verdict

_LEFT_OUT = (Checkpoint, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ProgressBar, SelectionMonitor)


@dataclass(frozen=True)
class Plan:
    """What a trial has found, and what follows.

    Attributes:
        trial: of the run.
        methods: what each method costs at its sizes.
        answer: when a verdict can be expected.
        has_verdict: whether the run is set to find out.
        recommendation: and what cannot pay.
        proxy: parameters of the proxy that was asked about.
    """

    trial: Trial
    methods: Sequence[MethodCost]
    answer: AnswerExpected
    has_verdict: bool
    recommendation: Recommendation
    proxy: float | None = None

    def builtins(self) -> dict[str, object]:
        """Return it for JSON."""
        return {
            "trial": builtins(self.trial),
            "methods": [asdict(each) for each in self.methods],
            "answer": asdict(self.answer),
            "recommendation": asdict(self.recommendation),
        }


class PlanCLI(SelectionCLI):
    """A command line of ``fit`` whose run is a trial: it keeps nothing and ends when it is timed.

    Args:
        args: of ``fit``.
        folder: where the run may write.
        seconds: of the trial.
        proxy: number of parameters, or a file whose model is a proxy; None for none.

    Attributes:
        trial: times the run.
        proxy_parameters: None without a proxy.
    """

    trial: PlanTrial
    proxy_parameters: float | None = None

    def __init__(self, args: Sequence[str], folder: Path, seconds: float, proxy: str | None = None) -> None:
        self._given, self._place, self._seconds, self._proxy = args, folder, seconds, proxy
        super().__init__(["fit", *args])

    def instantiate_trainer(self, **kwargs: object) -> pl.Trainer:
        """Build the Trainer without what keeps or shows anything."""
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        kept = [each for each in given if not isinstance(each, _LEFT_OUT)]
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        settings: dict[str, object] = {
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "val_check_interval": 1.0,
            "min_steps": None,
        }
        settings |= {"check_val_every_n_epoch": 1, "min_epochs": None, "default_root_dir": str(self._place)}
        return super().instantiate_trainer(callbacks=kept, **off, **settings, **kwargs)

    def before_fit(self) -> None:
        """Put the trial behind the selection, and refuse a proxy that is too small."""
        super().before_fit()
        if self._proxy is not None:
            self.proxy_parameters = _parameters_of(self._proxy, self._given)
            check_proxy(self.proxy_parameters, _count(self.model))
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        selection = next((each for each in callbacks if isinstance(each, DataSelection)), None)
        if selection is None:
            raise ValueError(
                "expected a selection to plan, got a configuration without one: name it under `select`, for instance "
                "liveselect.callbacks.LiveSelection"
            )
        selection.dirpath = self._place / "selection"
        self.trial = PlanTrial(selection, self._seconds)
        callbacks.append(self.trial)


def make_plan(args: Sequence[str], folder: Path, seconds: float, proxy: str | None = None) -> Plan | None:
    """Run a trial of a configuration of ``fit`` and return the plan; None on other ranks than the first.

    Args:
        args: of ``fit``.
        folder: where the trial may write.
        seconds: of the trial, about.
        proxy: number of parameters, or a file whose model is one.

    Raises:
        ValueError: there is no selection, the run is too short to be timed, or the proxy is too small.
    """
    cli = PlanCLI(args, folder, seconds, proxy)
    found, selection = cli.trial.found, cli.trial.selection
    if found is None:
        raise ValueError("expected a run of at least 2 steps to time, got a shorter one: raise trainer.max_steps")
    if not cli.trainer.is_global_zero:
        return None
    return Plan(
        trial=found,
        methods=cli.trial.methods,
        answer=answer_expected(found, selection.verdict or Verdict(), cli.trial.judged_rows),
        has_verdict=selection.verdict is not None,
        recommendation=recommend(found, cli.trial.methods),
        proxy=cli.proxy_parameters,
    )


def _parameters_of(proxy: str, args: Sequence[str]) -> float:
    """Return the parameters of a proxy: the number itself, or those of the model of a file on top of the others."""
    if not Path(proxy).exists():
        try:
            return float(proxy)
        except ValueError:
            raise FileNotFoundError(
                f"expected --proxy as a number of parameters (160e6) or a file, found no file {proxy}"
            ) from None
    return _count(SelectionCLI([*args, f"--config={proxy}"], run=False).model)


def _count(module: pl.LightningModule) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters()))
