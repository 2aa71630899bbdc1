"""Where the logs of a run lie: the driver's, and those of its parts on all nodes.

RUN/driver.log              what the driver's console says
RUN/logs/SESSION/           logs of a local Ray, once the run has ended (deploy/cluster/janitor.py)
RUN/logs/HOST-NODE/         logs of a node of a cluster, while the run goes on (deploy/cluster/node_logs.py)
"""

from __future__ import annotations

from pathlib import Path

from deploy.cluster.control import ROSTER, read_roster
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from deploy.run.state import DRIVER_LOG


def driver_log(folder: Path) -> Path:
    """The driver's log. ConfigError if the run has none."""
    log = folder / DRIVER_LOG
    if not log.is_file():
        raise ConfigError(f"{folder} has no {DRIVER_LOG}: no session of the run has begun")
    return log


def part_log(folder: Path, part: str) -> Path:
    """The log of a part, by its name in the roster: where its process writes it, else as kept in the run.

    Of a run with several policies the policy's name comes first: keeper/rollout-0.
    """
    places = _logs(folder)
    for roster in sorted((folder / run_folder.POLICIES).glob(f"*/{ROSTER}")):
        places |= _logs(roster.parent, f"{roster.parent.name}/")
    if part not in places:
        named = f"; it has {', '.join(places)}" if places else ""
        raise ConfigError(f"{folder} has no part {part} with a log{named}")
    log = places[part]
    found = [log, *sorted(folder.glob(f"logs/*/{log.name}"))]
    for each in found:
        if each.is_file():
            return each
    raise ConfigError(
        f"the log of {part} is {log} on its own host, and has not been copied to {folder / 'logs'}"
    )


def _logs(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Where the parts of a roster write their logs, by name."""
    return {f"{prefix}{each['part']}": Path(each["log"]) for each in read_roster(folder) if each.get("log")}
