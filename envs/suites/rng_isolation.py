"""Isolation of packages that print or draw from the global random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOBase
from typing import Any

import numpy as np

States = tuple[Any, Any]  # of random, of numpy.random


class _NullStream(TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def suppress_stdout() -> Iterator[None]:
    """Discard what Python code prints."""
    with redirect_stdout(_NullStream()):
        yield


class IsolatedRng:
    """Private states of Python's and NumPy's global generators, one per replica.

    Enter it around every call that may draw, never nested. Output is discarded as well.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Seed both generators; a seed is any integer from 0 up."""
        self._own: States = (
            random.Random(seed).getstate(),
            np.random.RandomState(seed % 2**32).get_state(legacy=False),
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Swap the private states in for the duration of the block."""
        outside = _get_states()
        _set_states(self._own)
        try:
            with suppress_stdout():
                yield
        finally:
            self._own = _get_states()
            _set_states(outside)


def _get_states() -> States:
    return random.getstate(), np.random.get_state(legacy=False)


def _set_states(states: States) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
