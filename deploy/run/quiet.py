"""What libraries and their processes print, kept in a file instead of the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def output_kept_in(log: Path) -> Iterator[None]:
    """Send stdout and stderr of this process and of those it starts to the file while the context is open."""
    kept = {}
    with log.open("ab") as file:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            kept[descriptor] = os.dup(descriptor)
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(kept[descriptor], descriptor)
            os.close(kept[descriptor])
