"""Cache of encoded texts with a bound on its bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

_BYTES_A_TOKEN = 40  # pointer in a tuple, and the int object
_BYTES_AN_ENTRY = 300


class PromptCache:
    """`encode` with an LRU cache of about `most_bytes`; 0 disables it. Thread-safe."""

    def __init__(self, encode: Callable[[str], tuple[int, ...]], most_bytes: int) -> None:
        self._encode = encode
        self._most_bytes = most_bytes
        self._known: OrderedDict[str, tuple[int, ...]] = OrderedDict()  # the most recently used is last
        self._lock = Lock()
        self.bytes = 0

    def __call__(self, text: str) -> tuple[int, ...]:
        with self._lock:
            if (ids := self._known.get(text)) is not None:
                self._known.move_to_end(text)
                return ids
        ids = self._encode(text)
        if (cost := _bytes_of(text, ids)) > self._most_bytes:
            return ids
        with self._lock:
            if text not in self._known:
                self._known[text] = ids
                self.bytes += cost
            while self.bytes > self._most_bytes:
                self.bytes -= _bytes_of(*self._known.popitem(last=False))
        return ids


def _bytes_of(text: str, ids: tuple[int, ...]) -> int:
    return _BYTES_AN_ENTRY + len(text) + _BYTES_A_TOKEN * len(ids)
