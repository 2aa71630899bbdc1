"""Clean-up of the driver's host after a run, for any end of the run.

Every process of a run has MANTA_RUN=<id> in its environment. The janitor, a small separate process, waits for the
driver's end. After a grace period it kills processes that still have the id, moves Ray's logs into the run folder and
removes the temporary folder. It touches nothing without the id, and needs no manual step even after kill -9 of the
driver.
"""

from __future__ import annotations

import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TAG = "MANTA_RUN"
GRACE_SECONDS = 15.0  # for Ray and vLLM to end by themselves after the driver
_POLL_SECONDS = 0.5
_LONGEST_TEMPORARY = 24
_REMOVALS = 20  # attempts to remove the folder, _POLL_SECONDS apart, while a process still writes into it


def tag_run() -> str:
    """Mark this process and every process it starts as belonging to a new run; returns the id.

    An inherited id belongs to another run or was exported by the user, and is replaced.
    """
    # Ray's agents and vLLM's processes set process titles, which would overwrite the start of the environment that the
    # janitor reads; the order of variables differs from start to start.
    os.environ["SPT_NOENV"] = "1"
    run = os.environ[TAG] = secrets.token_hex(8)
    return run


def temporary_of(run: str) -> Path:
    """The folder for temporary files of a run's processes on this host; it is not created."""
    # Ray's sockets are 66 bytes deeper, and a socket's path is limited to 107.
    parent = tempfile.gettempdir()
    return Path(parent if len(parent) <= _LONGEST_TEMPORARY else "/tmp") / f"manta-{run[:8]}"


def make_private(temporary: Path) -> None:
    """Make the folder for all temporary files of this process and its children; the janitor removes it.

    Its mode is 700: other users cannot reach its files, for any modes of those. FileExistsError if it exists.
    """
    temporary.mkdir(mode=0o700)
    os.environ["TMPDIR"] = str(temporary)


def ray_folder(temporary: Path) -> Path:
    """The folder for sockets and logs of a local Ray: one level deeper, since Ray makes its folder mode 0777."""
    return temporary / "r"


def prepare_local_ray() -> None:
    """Set the environment of a local Ray; call it before ray is imported.

    Ray then listens on the loopback interface alone, requires a token that exists only in the environment of these
    processes, and ends the process group of a worker that died.
    """
    if "ray" in sys.modules:  # its settings are already read, and must not be changed in part
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # sets Ray's own address to 127.0.0.1
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "true")
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def start_janitor(run: str, folder: Path, temporary: Path | None) -> subprocess.Popen[bytes]:
    """Start the janitor of this process; it acts after this process has ended."""
    command = [sys.executable, "-m", "deploy.cluster.janitor", run, str(os.getpid()), str(folder.resolve())]
    command += [str(temporary)] if temporary else []
    environment = {name: value for name, value in os.environ.items() if name != TAG}
    # In its own session, out of reach of Ctrl-C and of the end of a Ray job's process group.
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def processes_of(run: str) -> Iterator[int]:
    """The processes of a run on this host, by its id in their environment."""
    wanted = f"{TAG}={run}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                found = wanted in (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended, or belongs to another user
                continue
            if found:
                yield int(entry.name)


def clean_up(run: str, folder: Path, temporary: Path | None, grace: float = GRACE_SECONDS) -> None:
    """Kill the remaining processes of a run and remove its temporary files; logs are moved to RUN/logs."""
    deadline = time.monotonic() + grace
    while any(processes_of(run)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    while left := list(processes_of(run)):
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(_POLL_SECONDS)
    if temporary is not None:
        try:
            if folder.is_dir():
                keep_logs(temporary, folder)
        finally:  # also if the logs cannot be moved
            remove(temporary)


def remove(temporary: Path) -> None:
    """Remove a folder, with further attempts while a process writes into it."""
    for _ in range(_REMOVALS):
        shutil.rmtree(temporary, ignore_errors=True)
        if not temporary.exists():
            return
        time.sleep(_POLL_SECONDS)


def keep_logs(temporary: Path, folder: Path) -> None:
    """Move a local Ray's logs into the run folder."""
    for session in ray_folder(temporary).glob("session_2*"):
        if (session / "logs").is_dir():
            target = folder / "logs" / session.name
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(session / "logs", target)


def with_kept_logs(text: str, temporary: Path, folder: Path) -> str:
    """Replace paths of a local Ray's logs in a message by their paths after the run."""
    return re.sub(
        rf"{re.escape(str(ray_folder(temporary)))}/(session_[^/]+)/logs/",
        lambda found: f"{folder}/logs/{found[1]}/",  # a function, since a folder's name may have a backslash
        text,
    )


def main(arguments: list[str]) -> None:
    """RUN DRIVER_PID FOLDER [TEMPORARY]: wait for the driver's end, then clean up."""
    run, driver, folder = arguments[0], int(arguments[1]), Path(arguments[2])
    try:
        waiting = os.pidfd_open(driver)
    except ProcessLookupError:
        pass
    else:
        select.select([waiting], [], [])  # blocks until the driver has ended
    clean_up(run, folder, Path(arguments[3]) if len(arguments) > 3 else None)


if __name__ == "__main__":
    main(sys.argv[1:])
