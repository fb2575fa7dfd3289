"""Shows rounds in Weights & Biases: scalars, histograms, tables, charts and artifacts of one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liveselect.decisions import read_plan
from liveselect.ledger import Evaluation, RoundRecord, spread
from liveselect.monitoring.view import (
    BY_FLOPS,
    EXAMPLE_COLUMNS,
    PREFIX,
    SCREEN,
    RoundView,
    evaluation_scalars,
    example_rows,
    is_of_validation,
    sectioned,
)
from liveselect.monitoring.workspace import save_in_background

if TYPE_CHECKING:
    import wandb

POINTS_DRAWN, LINES_DRAWN = 200, 8
"""Limits of a chart, which the browser draws."""
BY_ROUND = ("mixture", "arms", "drift")
"""Sections whose numbers are shown against rounds; the others are against steps."""
MAX_UPLOAD_BYTES = 256 * 2**20
"""A larger file of decisions stays on the disk, and the artifact says where."""


class WandbSink:
    """Writes to a W&B run. Nothing here waits for the network.

    Args:
        run: the run, ``WandbLogger.experiment``.
    """

    def __init__(self, run: "wandb.Run") -> None:
        import wandb

        self._wandb = wandb
        self._run = run
        self._pool: str | None = None
        self._defined = {PREFIX.rstrip("/")}

    def begin(self, about: Mapping[str, object]) -> None:
        """Define the axes of the numbers of selection, and add ``about`` to the run's configuration."""
        self._run.config.update({"selection": dict(about)}, allow_val_change=True)
        for axis in ("step", "round", "total_flops"):
            self._run.define_metric(f"{PREFIX}{axis}")
        self._run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")
        for part in BY_ROUND:
            self._define(f"selection_{part}")
        self._run.define_metric(f"{BY_FLOPS}*", step_metric=f"{PREFIX}total_flops")

    def save_view(self) -> None:
        """Save the view of selection in the run's project, in the background; offline runs cannot."""
        if not self._run.offline and not getattr(self._run, "disabled", False):
            save_in_background(self._run.entity, self._run.project)

    def round(self, view: RoundView, rich: bool) -> None:
        """Show a round; ``rich`` adds tables, charts and artifacts."""
        found: dict[str, object] = {sectioned(name): value for name, value in view.scalars.items()}
        for section in {name.partition("/")[0] for name in found}:
            self._define(section)
        found |= self._histograms(view.record)
        found["trainer/global_step"] = view.record.step
        if rich:
            if view.examples:
                found[f"{SCREEN}examples"] = self._wandb.Table(columns=[*EXAMPLE_COLUMNS], data=example_rows(view))
            if view.record.groups:
                found[f"{SCREEN}groups"] = self._groups(view.record)
            found |= self._charts(view)
        self._run.log(found)
        if rich:
            self._artifacts(view)

    def evaluation(self, entry: Evaluation) -> None:
        """Show a validation against the total cost."""
        self._run.log({**evaluation_scalars(entry), "trainer/global_step": entry.step})

    def verdict(self, said: str, sentence: str) -> None:
        """Write the verdict into the run's summary."""
        self._run.summary.update({f"{PREFIX}verdict": said, f"{PREFIX}verdict_because": sentence})

    def alert(self, title: str, text: str) -> None:
        """Send an alert."""
        self._run.alert(title=title, text=text, level="WARN", wait_duration=0)

    def end(self, checkpoint: Path | None, plan: str | None) -> None:
        """Name the checkpoint that the plans led to."""
        if checkpoint is not None and checkpoint.is_file():
            artifact = self._artifact("checkpoint", "model", {"plan": plan, "path": str(checkpoint)})
            artifact.add_reference(checkpoint.resolve().as_uri(), name=checkpoint.name, checksum=False)
            self._run.log_artifact(artifact)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _define(self, section: str) -> None:
        """Set the axis of a section's numbers, once."""
        if section not in self._defined:
            self._defined.add(section)
            axis = "round" if section.removeprefix("selection_") in BY_ROUND else "step"
            self._run.define_metric(f"{section}/*", step_metric=f"{PREFIX}{axis}")

    def _histograms(self, record: RoundRecord) -> dict[str, object]:
        found: dict[str, object] = {}
        if record.histogram is not None:
            edges = record.histogram.edges
            for name, counts in (("scores", record.histogram.counts), ("scores_of_chosen", record.histogram.chosen)):
                binned = np.asarray(counts), np.asarray(edges)
                found[f"selection_histograms/{name}"] = self._wandb.Histogram(np_histogram=binned)
        influence = np.asarray(record.influence, dtype=np.float64)
        if np.isfinite(influence).any():
            binned = np.histogram(influence[np.isfinite(influence)], bins=64)
            found["selection_histograms/influence"] = self._wandb.Histogram(np_histogram=binned)
        return found

    def _groups(self, record: RoundRecord) -> "wandb.Table":
        rows = sorted(record.groups.items(), key=lambda item: -item[1].get("chosen", 0))[:POINTS_DRAWN]
        keys = list(dict.fromkeys(key for _, row in rows for key in row))
        data = [[record.round, name, *(row.get(key) for key in keys)] for name, row in rows]
        return self._wandb.Table(columns=["round", "group", *keys], data=data)

    def _charts(self, view: RoundView) -> dict[str, object]:
        """Return charts, which W&B shows in the workspace without a click."""
        plot, ledger = self._wandb.plot, view.ledger
        charts: dict[str, object] = {}
        rounds = spread(ledger.rounds, POINTS_DRAWN)
        names = _largest_groups(rounds)
        if len(names) > 1:
            ys = [[record.share(name) for record in rounds] for name in names]
            charts["mixture"] = plot.line_series(
                [record.round for record in rounds], ys, keys=names, title="What is chosen", xname="round"
            )
        curves = _loss_curves(spread(ledger.evaluations, POINTS_DRAWN))
        if curves:
            xs, ys = [xs for xs, _ in curves.values()], [ys for _, ys in curves.values()]
            title = "Loss against total FLOPs, selection included"
            charts["loss"] = plot.line_series(xs, ys, keys=list(curves), title=title, xname="FLOPs")
        known = [record for record in rounds if "regressor/spearman" in record.metrics]
        if known:
            held_out = known[-1].metrics.get("regressor/held_out", 0.0)
            title = (
                f"Rank correlation of predicted and measured influence, on {held_out:.0f} held out in the last round"
            )
            ys = [[record.metrics["regressor/spearman"] for record in known]]
            indices = [record.round for record in known]
            charts["rank correlation"] = plot.line_series(
                indices, ys, keys=["rank correlation"], title=title, xname="round"
            )
        costs = {"training": ledger.training_seconds}
        for record in ledger.rounds:
            for phase, seconds in record.seconds.items():
                costs[phase] = costs.get(phase, 0.0) + seconds
        table = self._wandb.Table(columns=["phase", "seconds"], data=[list(item) for item in costs.items()])
        charts["cost"] = plot.bar(table, "phase", "seconds", title="Where the time went")
        return {f"{SCREEN}{name}": chart for name, chart in charts.items()}

    def _artifacts(self, view: RoundView) -> None:
        """Store pool (once), scores and plan, each with the names of its sources."""
        record = view.record
        if self._pool is None:
            self._pool = f"pool-{view.pool[:16]}".replace("/", "-")
            pool = self._wandb.Artifact(self._pool, type="pool", metadata={"fingerprint": view.pool})
            with pool.new_file("fingerprint.txt") as file:
                file.write(view.pool)
            if self._run.offline:  # inputs can be named only online
                self._run.log_artifact(pool)
            else:
                self._run.use_artifact(pool)
        if view.decisions is None or not view.decisions.is_file():
            return
        about = {"round": record.round, "step": record.step, "pool": self._pool, "selector": record.selector}
        scores = self._artifact("scores", "scores", about)
        self._add(scores, view.decisions)
        self._run.log_artifact(scores)
        plan = self._artifact(
            "plan", "plan", {**about, "scores": scores.name, "fingerprint": record.plan, "chosen": record.chosen}
        )
        with plan.new_file("plan.npy", mode="wb") as file:
            np.save(file, read_plan(view.decisions).ids.numpy())
        self._run.log_artifact(plan)

    def _artifact(self, name: str, kind: str, metadata: Mapping[str, object]) -> "wandb.Artifact":
        return self._wandb.Artifact(f"{name}-{self._run.id}", type=kind, metadata=dict(metadata))

    def _add(self, artifact: "wandb.Artifact", path: Path) -> None:
        if path.stat().st_size <= MAX_UPLOAD_BYTES:
            artifact.add_file(str(path))
        else:
            artifact.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)


def _largest_groups(rounds: Sequence[RoundRecord]) -> list[str]:
    totals: dict[str, float] = {}
    for record in rounds:
        for name in record.groups:
            totals[name] = totals.get(name, 0.0) + record.share(name)
    return sorted(totals, key=lambda name: -totals[name])[:LINES_DRAWN]


def _loss_curves(entries: Sequence[Evaluation]) -> dict[str, tuple[list[float], list[float]]]:
    last = entries[-1].metrics if entries else {}
    names = [name for name in last if "loss" in name and is_of_validation(name)]
    curves = {}
    for name in names[:LINES_DRAWN]:
        points = [(e.training_flops + e.selection_flops, e.metrics[name]) for e in entries if name in e.metrics]
        curves[name] = ([x for x, _ in points], [y for _, y in points])
    return curves
