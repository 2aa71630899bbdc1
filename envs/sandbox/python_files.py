"""What of the host a sandbox shows: the Python installation, as the files that running it takes, and no package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LISTING_SECONDS = 60.0
# Not /dev/zero: mapped as shared it is memory that stays whole while one page of it is mapped.
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")
# Neither site nor the working directory nor user packages; nothing is compiled to disk; text is UTF-8 everywhere.
FLAGS = ("-S", "-s", "-P", "-B", "-X", "utf8")

# Load what the standard library can load, then ask the loader which files that took.
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
    """Python as a sandbox shows it."""

    executable: str
    shown: tuple[tuple[str, str], ...]  # (path on the host without links, path in the sandbox), folders first
    covered: tuple[str, ...]  # folders of `shown` that are shown empty


@cache
def installation() -> Installation:
    """The Python that runs this, without its virtual environment. Raises OSError, subprocess.TimeoutExpired."""
    executable = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    asked = subprocess.run(
        [executable, *FLAGS, "-c", _LISTING],
        env={},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LISTING_SECONDS,
        encoding="utf-8",
    )
    if asked.returncode:
        said = asked.stderr.strip().rpartition("\n")[2]
        raise OSError(f"{executable} could not list its files (exit status {asked.returncode}): {said}")
    listed, loaded = json.loads(asked.stdout)
    folders = sorted({os.path.realpath(folder) for folder in listed})
    folders = [each for each in folders if not each.startswith(tuple(f"{other}/" for other in folders))]
    packages = [Path(folder, name) for folder in folders for name in ("site-packages", "dist-packages")]
    # A name without a slash is the program itself or what the kernel maps; the cache says where libraries lie.
    files = {name for name in loaded if name.startswith("/")} | {executable, "/etc/ld.so.cache", *DEVICES}
    shown = [(folder, folder) for folder in folders]
    shown += [
        (os.path.realpath(name), name)
        for name in sorted(files)
        if os.path.exists(name) and not name.startswith(tuple(f"{folder}/" for folder in folders))
    ]
    return Installation(executable, tuple(shown), tuple(str(each) for each in packages if each.is_dir()))
