"""A store of whole objects by name, which is all that the copy of a run's state asks of shared storage.

create    exclusive and whole: of all that create a name, in any process on any host, one succeeds, and a reader finds
          nothing or all of its bytes. The copy's safety rests on this alone
names     contains every object that was created before this process last created one
get       returns an object that was created, by its name, even if `names` does not have it yet

A folder has the first by link(2), which the server of a network file system executes, and the second because a client
that has changed a folder reads it again. S3 has all three (If-None-Match). Storage without the first is refused.
"""

from __future__ import annotations

import inspect
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.spec import AbstractFileSystem

from rollout.buffer.ledger_checks import LedgerError
from rollout.wire.whole_file import sync

_PROBE = "copy/probe"


class Objects(Protocol):
    """Objects under one base; a name is FOLDER/FILE or FILE."""

    def create(self, name: str, data: bytes) -> None:
        """Store an object durably. FileExistsError if there is one of this name, another OSError if that is unknown."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Store or replace an object durably."""
        ...

    def get(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def names(self, folder: str) -> dict[str, int]:
        """The objects of a folder with their sizes in bytes."""
        ...

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        ...


class FolderObjects:
    """Objects as files of a folder on any POSIX file system."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._writer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

    def create(self, name: str, data: bytes) -> None:
        self._store(name, data, exclusive=True)

    def put(self, name: str, data: bytes) -> None:
        self._store(name, data, exclusive=False)

    def get(self, name: str) -> bytes:
        return (self._base / name).read_bytes()

    def names(self, folder: str) -> dict[str, int]:
        found = {}
        with suppress(FileNotFoundError), os.scandir(self._base / folder) as entries:
            for entry in entries:
                if entry.name[0] != ".":
                    with suppress(FileNotFoundError):  # removed meanwhile
                        found[entry.name] = entry.stat().st_size
        return found

    def remove(self, name: str) -> None:
        (self._base / name).unlink(missing_ok=True)

    def _store(self, name: str, data: bytes, exclusive: bool) -> None:
        path = self._base / name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{self._writer}")
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if exclusive:
                os.link(aside, path)
            else:
                aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)


class RemoteObjects:
    """Objects of a store that fsspec knows, such as s3://bucket/run."""

    def __init__(self, url: str) -> None:
        files, self._base = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        self._files: AbstractFileSystem = files
        if not _creates(files):
            raise LedgerError(
                f"buffer.copy_to={url}: its file system ({type(files).__name__}) cannot create an object exclusively; "
                "use a folder that all nodes share, or a store such as S3"
            )

    def create(self, name: str, data: bytes) -> None:
        self._files.pipe_file(self._path(name), data, mode="create")

    def put(self, name: str, data: bytes) -> None:
        self._files.pipe_file(self._path(name), data)

    def get(self, name: str) -> bytes:
        return bytes(self._files.cat_file(self._path(name)))

    def names(self, folder: str) -> dict[str, int]:
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {each["name"].rpartition("/")[2]: int(each["size"] or 0) for each in found}

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._base.rstrip('/')}/{name}"


def objects_at(base: str) -> Objects:
    """The store at a folder or URL. LedgerError, one line, if it cannot be used or is not exclusive."""
    try:
        store: Objects = RemoteObjects(base) if is_url(base) else FolderObjects(Path(base))
        _try(store, base)
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, LedgerError):
            raise
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LedgerError(
            f"buffer.copy_to={base}: cannot be used ({said}); check the place, its package and credentials"
        ) from error
    return store


def is_url(base: str) -> bool:
    return "://" in base


def _creates(files: Any) -> bool:
    """Whether a file system has its own exclusive creation; fsspec's general one looks first and then writes."""
    method = files._pipe_file if files.async_impl else files.pipe_file
    general = getattr(method, "__func__", None) is AbstractFileSystem.pipe_file
    return not general and "mode" in inspect.signature(method).parameters


def _try(store: Objects, base: str) -> None:
    name = f"{_PROBE}-{secrets.token_hex(8)}"
    store.create(name, b"one")
    try:
        store.create(name, b"other")
    except FileExistsError:
        if store.get(name) == b"one":
            return
    finally:
        store.remove(name)
    raise LedgerError(
        f"buffer.copy_to={base}: an object that is there can be created again, so two writers would not notice each "
        "other; use another store"
    )
