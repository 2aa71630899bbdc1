"""Versions of a policy kept on disk as they were published, for engines that hold one of them while others go on.

FOLDER/version-NNNNNNNN.json   the manifest: an engine that loads the version proves the same as with a new one
FOLDER/version-NNNNNNNN.bytes  its tensors, back to back
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from rollout.wire.weights import Handle, WeightUpdate
from rollout.wire.whole_file import replace_file


class VersionMissing(RuntimeError):
    """A version that was to be kept is not there; the message names its file."""


class KeptVersions:
    """The versions of one policy in a folder; each appears there whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, update: WeightUpdate) -> None:
        """Store a version, in the place of an earlier one with its number."""
        self._folder.mkdir(parents=True, exist_ok=True)
        payload, manifest = self._files(update.version)
        aside = payload.with_name(f".{payload.name}.part")
        with aside.open("wb") as writing:
            for _, array in update.tensors():
                writing.write(array.data)
            writing.flush()
            os.fsync(writing.fileno())
        aside.replace(payload)
        replace_file(manifest, json.dumps(asdict(update.manifest)))

    def open(self, version: int) -> WeightUpdate:
        """A version as it was published. Raises VersionMissing."""
        payload, manifest = self._files(version)
        if not manifest.is_file():
            raise VersionMissing(f"version {version} is not kept: there is no {manifest}")
        handle = asdict(Handle("rollout.wire.weights:open_file", str(payload)))
        plain = {"manifest": json.loads(manifest.read_text(encoding="utf-8")), "handle": handle}
        return WeightUpdate.from_plain(plain)

    def keep_only(self, needed: Collection[int]) -> None:
        """Remove all other versions."""
        for manifest in self._folder.glob("version-*.json"):
            version = int(manifest.stem.removeprefix("version-"))
            if version not in needed:
                for file in reversed(self._files(version)):
                    file.unlink(missing_ok=True)

    @property
    def versions(self) -> list[int]:
        """The versions that are there, oldest first."""
        return sorted(int(each.stem.removeprefix("version-")) for each in self._folder.glob("version-*.json"))

    def _files(self, version: int) -> tuple[Path, Path]:
        name = f"version-{version:08d}"
        return self._folder / f"{name}.bytes", self._folder / f"{name}.json"
