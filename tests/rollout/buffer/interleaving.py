"""Threads that take turns in an order drawn by chance, one operation on shared storage at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from random import Random

from rollout.buffer.objects import Objects

LIMIT_SECONDS = 60.0


class Turns:
    """Runs functions in threads; of those that are about to use the storage, chance says which goes on."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        self._chosen = -1

    def step(self) -> None:
        """Wait for this thread's turn."""
        me = threading.get_ident()
        with self._changed:
            self._waiting.append(me)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._chosen == me, LIMIT_SECONDS), "the turn did not come"
            self._chosen = -1
            self._waiting.remove(me)

    def run(self, functions: Mapping[str, Callable[[], None]]) -> None:
        """Return when all have ended; raises the first error that one of them did."""
        errors: list[BaseException] = []
        working = len(functions)

        def guarded(function: Callable[[], None]) -> None:
            nonlocal working
            try:
                self.step()
                function()
            except BaseException as error:
                errors.append(error)
            finally:
                with self._changed:
                    working -= 1
                    self._changed.notify_all()

        threads = [
            threading.Thread(target=guarded, args=(each,), name=name, daemon=True)
            for name, each in functions.items()
        ]
        for thread in threads:
            thread.start()
        with self._changed:
            while working:
                all_wait = self._changed.wait_for(
                    lambda: self._chosen == -1 and len(self._waiting) == working, LIMIT_SECONDS
                )
                assert all_wait, "a thread neither ended nor waited for its turn"
                if working:
                    self._chosen = self._random.choice(sorted(self._waiting))
                    self._changed.notify_all()
        if errors:
            raise errors[0]


class MemoryObjects:
    """The contract of a store in a dictionary; every operation is atomic."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}

    def create(self, name: str, data: bytes) -> None:
        if self.stored.setdefault(name, data) is not data:
            raise FileExistsError(name)

    def put(self, name: str, data: bytes) -> None:
        self.stored[name] = data

    def get(self, name: str) -> bytes:
        if name not in self.stored:
            raise FileNotFoundError(name)
        return self.stored[name]

    def names(self, folder: str) -> dict[str, int]:
        inside = {name: data for name, data in self.stored.items() if name.startswith(f"{folder}/")}
        return {name.removeprefix(f"{folder}/"): len(data) for name, data in inside.items()}

    def remove(self, name: str) -> None:
        self.stored.pop(name, None)


class InTurns:
    """A store whose every operation waits for its turn."""

    def __init__(self, objects: Objects, turns: Turns) -> None:
        self._objects, self._turns = objects, turns

    def create(self, name: str, data: bytes) -> None:
        self._turns.step()
        self._objects.create(name, data)

    def put(self, name: str, data: bytes) -> None:
        self._turns.step()
        self._objects.put(name, data)

    def get(self, name: str) -> bytes:
        self._turns.step()
        return self._objects.get(name)

    def names(self, folder: str) -> dict[str, int]:
        self._turns.step()
        return self._objects.names(folder)

    def remove(self, name: str) -> None:
        self._turns.step()
        self._objects.remove(name)
