"""Actors of Ray: made, awaited, and asked for their stacks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from deploy.config.supervise import PartLost, brief, within


def actor(cls: type, groups: dict[str, int] | None = None, **options: Any) -> Any:
    """The class as an actor without default resources. groups: its concurrency groups."""
    made = ray.remote(concurrency_groups=groups)(cls) if groups else ray.remote(cls)
    return made.options(**({"num_cpus": 0} | options))


async def awaited(reference: Any) -> Any:
    """A Ray reference as a coroutine, for asyncio's functions."""
    return await reference


async def stacks_of(handles: Mapping[str, Any]) -> dict[str, str]:
    """Stack traces of actors by name; an error text for those that do not answer."""

    async def ask(name: str, handle: Any) -> str:
        try:
            return str(await within(5.0, awaited(handle.stacks.remote()), name))
        except (PartLost, RayActorError) as error:
            return brief(error)

    told = await asyncio.gather(*(ask(*each) for each in handles.items()))
    return dict(zip(handles, told, strict=True))
