"""The host files that a sandbox shows: those needed to run the Python installation, without packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LISTING_SECONDS = 60.0
# Not /dev/zero: a shared mapping of it stays allocated while one of its pages is mapped.
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")
# No site, working directory or user packages on the path; no bytecode files; UTF-8 mode.
FLAGS = ("-S", "-s", "-P", "-B", "-X", "utf8")

# Loads all extension modules of the standard library, then asks the dynamic loader which files that needed.
_LISTING = """
import ctypes, json, os, sys

class Object(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("name", ctypes.c_char_p)]

files = []

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Object), ctypes.c_size_t, ctypes.c_void_p)
def note(found, size, data):
    files.append(os.fsdecode(found.contents.name))
    return 0

folders = [folder for folder in sys.path if os.path.isdir(folder)]
for folder in folders:
    for name in sorted(os.listdir(folder)):
        if name.endswith(".so") and not name.startswith(("_tkinter.", "_test", "_xx", "xx")):
            try:
                ctypes.CDLL(os.path.join(folder, name))
            except OSError:  # a module whose library this host lacks
                pass
ctypes.CDLL(None).dl_iterate_phdr(note, None)
print(json.dumps([folders, files]))
"""


@dataclass(frozen=True)
class Installation:
    """A Python installation as the sandbox shows it."""

    executable: str
    shown: tuple[tuple[str, str], ...]  # (resolved host path, path in the sandbox), folders first
    covered: tuple[str, ...]  # folders inside `shown` that appear empty


@cache
def installation() -> Installation:
    """The Python that runs this, without its virtual environment. Raises OSError, subprocess.TimeoutExpired."""
    executable = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    listing = subprocess.run(
        [executable, *FLAGS, "-c", _LISTING],
        env={},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LISTING_SECONDS,
        encoding="utf-8",
    )
    if listing.returncode:
        why = listing.stderr.strip().rpartition("\n")[2]
        raise OSError(f"{executable} could not list its files (exit status {listing.returncode}): {why}")
    listed, loaded = json.loads(listing.stdout)
    folders = sorted({os.path.realpath(folder) for folder in listed})
    folders = [each for each in folders if not each.startswith(tuple(f"{other}/" for other in folders))]
    packages = [Path(folder, name) for folder in folders for name in ("site-packages", "dist-packages")]
    # Names without a slash are the program itself or kernel mappings; the loader's cache locates libraries.
    files = {name for name in loaded if name.startswith("/")} | {executable, "/etc/ld.so.cache", *DEVICES}
    shown = [(folder, folder) for folder in folders]
    shown += [
        (os.path.realpath(name), name)
        for name in sorted(files)
        if os.path.exists(name) and not name.startswith(tuple(f"{folder}/" for folder in folders))
    ]
    return Installation(executable, tuple(shown), tuple(str(each) for each in packages if each.is_dir()))
