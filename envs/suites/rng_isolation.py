"""Calls into packages that print and draw from the global generators: outside of the call nothing is seen of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOBase
from typing import Any

import numpy as np

States = tuple[Any, Any]  # of random, of numpy.random


class _Nowhere(TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def quiet() -> Iterator[None]:
    """What Python code prints is lost."""
    with redirect_stdout(_Nowhere()):
        yield


class Generators:
    """Global generators of one's own: a replica's, whoever else draws from the global ones between its steps.

    To be entered around every call that may draw, and never while another is. Nothing is printed there either.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Begin anew; a seed is any whole number from 0 up."""
        self._own: States = (
            random.Random(seed).getstate(),
            np.random.RandomState(seed % 2**32).get_state(legacy=False),
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is drawn from Python's and NumPy's global generators within is drawn from these."""
        outside = _taken()
        _put(self._own)
        try:
            with quiet():
                yield
        finally:
            self._own = _taken()
            _put(outside)


def _taken() -> States:
    return random.getstate(), np.random.get_state(legacy=False)


def _put(states: States) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
