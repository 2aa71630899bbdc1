"""An environment to which things happen; a module of its own, so that its process starts quickly."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from threading import Lock
from typing import Any

import gymnasium as gym

from envs.base import text_space


class Trouble(gym.Env[str, str]):
    """Ends after so many turns, unless something happens at the second."""

    observation_space = text_space()
    action_space = text_space()

    def __init__(self, what: str = "none", nondeterministic: bool = False, turns: int = 3) -> None:
        self.what = what
        self.nondeterministic = nondeterministic
        self.turns = turns

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        return "begin", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        if self.turn == 2:
            self._happen()
        ends = self.turn == self.turns
        return str(self.turn), 0.5, ends, False, {"success": True, "lock": Lock()} if ends else {}

    def _happen(self) -> None:
        match self.what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                sys.exit(3)
            case "raise":
                raise ZeroDivisionError("no such tile")
            case "sleep":
                time.sleep(3600)
            case "spin":
                sum(itertools.repeat(1))  # C that looks at no signal and lets no other thread run
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)

    def snapshot(self) -> bytes:
        return b"turn %d" % self.turn

    def restore(self, snapshot: bytes) -> None:
        self.turn = int(snapshot.split()[1])


class Starter(gym.Env[str, str]):
    """Starts a process when it is reset, and says its id and what it was not to inherit; by seed 0 it never returns."""

    observation_space = text_space()
    action_space = text_space()

    def __init__(self, split: str = "all") -> None:
        del split  # having it is enough to be asked how each instance begins

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        if seed == 0:
            time.sleep(3600)
        started = subprocess.Popen(["sleep", "3600"])
        return f"{started.pid} {[name for name in os.environ if 'RAY_AUTH' in name]}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        os._exit(3)


def make(env_id: str, **options: Any) -> Trouble:
    return Trouble(**options)
