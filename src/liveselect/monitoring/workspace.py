"""A saved view of a W&B project with sections for the numbers of selection. Needs ``wandb-workspaces``."""

import logging
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from liveselect.monitoring.view import BY_FLOPS, PREFIX, SCREEN, sectioned

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes
    from wandb_workspaces.workspaces import Workspace

log = logging.getLogger("liveselect")

TITLE = "liveselect"
NAME = "nw-liveselect-v"
"""W&B's name of the view inside its project: fixed, so that all runs of the project share one view."""
INSTALL = "pip install wandb-workspaces"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: text above it.
        keys: names of its metrics below ``selection/``; ``*`` at the end stands for any ending.
        axis: name of the x axis, below ``selection/``.
        kind: lines, stacked areas, or the table that was logged last.
    """

    title: str
    keys: tuple[str, ...]
    axis: str = "step"
    kind: Literal["line", "stacked", "table"] = "line"


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Does it help?": (
        Panel("Loss against total FLOPs, selection included", (f"{BY_FLOPS}*",), "total_flops"),
        Panel("Reference loss before each round", ("reference_loss", "reference_loss_zero_step")),
        Panel("Loss on a held-out sample of the pool's own mixture", ("mixture_loss",)),
        Panel("Share of selection in the cost", ("time_share", "flops_share")),
        Panel("Regressor: rank correlation, held out", ("regressor/spearman",)),
        Panel("Regressor: influence of the fifth predicted best, held out, in sd", ("regressor/top_fifth",)),
        Panel("Measured candidates held out", ("regressor/held_out",)),
        Panel("Alarms and notes", ("alarms", "notes")),
    ),
    "What is chosen": (
        Panel("Mixture", ("mixture/*",), "round", "stacked"),
        Panel("Candidates", ("candidates", "measured", "chosen"), "round"),
        Panel("Times that what is trained on was trained on", ("effective_epochs",), "round"),
        Panel("Chosen and rejected text", ("examples",), kind="table"),
        Panel("Sources and arms", ("groups",), kind="table"),
    ),
    "How fast preferences move": (
        Panel("Rank correlation of scores with the round before", ("drift/rank_correlation",), "round"),
        Panel("Share of the plan that was also in the previous plan", ("drift/overlap",), "round"),
        Panel("Distance of the mixture from the round before", ("drift/mixture",), "round"),
        Panel("Influence of canaries", ("canary/*",)),
    ),
    "Arms": (
        Panel("Mean reward", ("arms/reward/*",), "round"),
        Panel("Pulls", ("arms/pulls/*",), "round"),
        Panel("Bonus", ("arms/bonus/*",), "round"),
    ),
    "Cost": (
        Panel("Seconds of a round by phase", ("cost/*",), "step", "stacked"),
        Panel("FLOPs of a round", ("round_flops",)),
        Panel("Total seconds, training and selection", ("total_seconds",)),
        Panel("Share of the devices' peak in use", ("mfu_training", "mfu_whole")),
    ),
}


def build_workspace(entity: str, project: str) -> "Workspace":
    """Return the view, not saved yet; below its sections W&B adds panels for all other metrics.

    Raises:
        ModuleNotFoundError: wandb-workspaces is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own
            import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the saved view needs the package wandb-workspaces: {INSTALL}") from error
    sections = [
        ws.Section(name=title, panels=[_panel(panel) for panel in panels], is_open=index < 2)
        for index, (title, panels) in enumerate(SECTIONS.items())
    ]
    view = ws.Workspace(entity=entity, project=project, name=TITLE, sections=sections, auto_generate_panels=True)
    view._internal_name = NAME  # without a fixed name, each run would save another view
    return view


def save_workspace(entity: str, project: str, replace: bool = False) -> str:
    """Save the view in the project, and return its address; an existing one is not changed, unless ``replace`` is set.

    Raises:
        ModuleNotFoundError: wandb-workspaces is not installed.
        Exception: what W&B raises without a network, a key or the right to write.
    """
    view = build_workspace(entity, project)
    url = str(view.url)
    try:
        saved = type(view).from_url(url)
    except ValueError as error:
        if "not found in project" not in str(error):
            raise
        view.save()
        return url
    if replace:
        for part in ("name", "sections", "settings", "runset_settings"):
            setattr(saved, part, getattr(view, part))
        saved.save()
    return url


def save_in_background(entity: str, project: str) -> threading.Thread | None:
    """Save the view in a daemon thread and return it, None without wandb-workspaces; a failure is only logged."""
    try:
        build_workspace(entity, project)
    except ModuleNotFoundError:
        return None

    def save() -> None:
        try:
            log.info("selection in W&B: %s", save_workspace(entity, project))
        except Exception as error:  # W&B raises many kinds, and none of them may stop the training
            log.warning("the view of selection could not be saved in W&B, training goes on without it: %s", error)

    thread = threading.Thread(target=save, name="liveselect-workspace", daemon=True)
    thread.start()
    return thread


def _panel(panel: Panel) -> "PanelTypes":
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=_full(panel.keys[0]), layout=wr.Layout(w=12, h=9))
    names = [_full(key) for key in panel.keys]
    is_pattern = names[0].endswith("*")
    return wr.LinePlot(
        title=panel.title,
        x=_full(panel.axis),
        y=[] if is_pattern else [*names],
        metric_regex=f"^{names[0].removesuffix('*')}.*" if is_pattern else None,
        plot_type="stacked-area" if panel.kind == "stacked" else None,
        layout=wr.Layout(w=8, h=6),
    )


def _full(key: str) -> str:
    if key in ("examples", "groups"):
        return SCREEN + key
    return key if key.startswith(BY_FLOPS) else sectioned(PREFIX + key)
