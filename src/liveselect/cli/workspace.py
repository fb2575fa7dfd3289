"""``liveselect workspace``: a saved view of a W&B project for selection."""

import argparse
from collections.abc import Sequence

DESCRIPTION = """\
Save a view in a W&B project with sections for the numbers of selection: whether it helps, what is chosen, how fast
preferences move, arms, cost. Runs with a SelectionMonitor save it when they begin online.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="liveselect workspace", description=DESCRIPTION)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where runs are logged: user or team, and project")
    parser.add_argument("--replace", action="store_true", help="restore a view that was changed")
    arguments = parser.parse_args(argv)
    entity, _, project = arguments.project.partition("/")
    if not entity or not project or "/" in project:
        parser.error(f"expected ENTITY/PROJECT such as my-team/pretraining, got {arguments.project!r}")

    from liveselect.cli.output import say
    from liveselect.monitoring.workspace import save_workspace

    say(save_workspace(entity, project, arguments.replace))
    return 0
