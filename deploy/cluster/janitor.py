"""What a run puts on the host it is started from, and how it is gone afterwards, however the run ends.

Every process of a run carries MANTA_RUN=<id> in its environment. A janitor, a small process of its own, waits for the
driver's end: whatever still carries the id after a grace is killed, Ray's logs are moved into the run folder and the
temporary folder is removed. It touches nothing that does not carry the id. It needs no manual step, not even after
kill -9 of the driver.
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
GRACE_SECONDS = 15.0  # what Ray and vLLM are given to end by themselves once the driver is gone
_POLL_SECONDS = 0.5
_LONGEST_TEMPORARY = 24
_REMOVALS = 20  # attempts, _POLL_SECONDS apart, while something still writes into the folder


def tag_run() -> str:
    """Mark this process, and with it every process it starts, as belonging to a new run; returns the id.

    An id that was inherited is another run's, or somebody's who exported it, and their processes are none of ours.
    """
    # Ray's agents and vLLM's processes give themselves titles, and would write them over the environment that the
    # janitor knows them by: whichever variables come first, in an order that differs from start to start.
    os.environ["SPT_NOENV"] = "1"
    run = os.environ[TAG] = secrets.token_hex(8)
    return run


def temporary_of(run: str) -> Path:
    """Where the temporary files of a run's processes on this host will lie; nothing is made."""
    # Ray's sockets lie 66 bytes below, and a socket's path has room for 107.
    parent = tempfile.gettempdir()
    return Path(parent if len(parent) <= _LONGEST_TEMPORARY else "/tmp") / f"manta-{run[:8]}"


def make_private(temporary: Path) -> None:
    """Make the folder for all temporary files of this process and those it starts; the janitor removes it.

    Its mode is 700: no other user reaches what lies in it, whatever modes that has. FileExistsError where it is there.
    """
    temporary.mkdir(mode=0o700)
    os.environ["TMPDIR"] = str(temporary)


def ray_folder(temporary: Path) -> Path:
    """Where a local Ray keeps its sockets and logs: one level down, since Ray makes its folder mode 0777."""
    return temporary / "r"


def prepare_local_ray() -> None:
    """Set what a local Ray reads from the environment; to be called before ray is imported.

    It listens on the loopback interface alone, asks for a token that lives in these processes' environment only, and
    ends the process group of a worker that died.
    """
    if "ray" in sys.modules:  # it has read its settings already, and must not be given half of them
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # what makes Ray's own address 127.0.0.1
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "true")
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def start_janitor(run: str, folder: Path, temporary: Path | None) -> subprocess.Popen[bytes]:
    """Start the janitor of this process: it acts when this process has ended."""
    command = [sys.executable, "-m", "deploy.cluster.janitor", run, str(os.getpid()), str(folder.resolve())]
    command += [str(temporary)] if temporary else []
    environment = {name: value for name, value in os.environ.items() if name != TAG}
    # A session of its own: Ctrl-C in the terminal and the end of a Ray job's process group must not reach it.
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def processes_of(run: str) -> Iterator[int]:
    """The processes on this host that carry a run's id."""
    wanted = f"{TAG}={run}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                found = wanted in (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # gone meanwhile, or somebody else's
                continue
            if found:
                yield int(entry.name)


def clean_up(run: str, folder: Path, temporary: Path | None, grace: float = GRACE_SECONDS) -> None:
    """End what is left of a run and take its temporary files away; its logs go to RUN/logs."""
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
        finally:  # also where they cannot be kept
            remove(temporary)


def remove(temporary: Path) -> None:
    """Remove a folder, again where something wrote into it meanwhile."""
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
    """A message that names a local Ray's logs, naming them where they will be found after the run."""
    return re.sub(
        rf"{re.escape(str(ray_folder(temporary)))}/(session_[^/]+)/logs/",
        lambda found: f"{folder}/logs/{found[1]}/",  # a folder's name may hold a backslash
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
        select.select([waiting], [], [])  # until the driver has ended, which is what this process is for
    clean_up(run, folder, Path(arguments[3]) if len(arguments) > 3 else None)


if __name__ == "__main__":
    main(sys.argv[1:])
