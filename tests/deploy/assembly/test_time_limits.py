"""Waits that depend on a model's size have limits that grow with its bytes, against sums by hand."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.assembly.time_limits import limits_for, time_limits
from deploy.cluster.member import beat
from deploy.config.load import load_config
from deploy.config.supervise import PartLost
from rollout.wire import actors
from tests.deploy.small_run import configured
from tests.qwen3 import QWEN3_8B

GB = 10**9


def test_a_models_bytes_are_added_to_the_recipes_limits() -> None:
    config = load_config("qwen3_8b_gsm8k", ["cluster.start_timeout_seconds=300"])
    limits = limits_for(config, 8 * GB)
    # 16 GB in bfloat16: 80 s from node to node at 0.2 GB/s, and hashed and loaded at 0.5 GB/s in 32 s each.
    assert limits.sync == pytest.approx(120 + 80 + 64)
    assert limits.load == pytest.approx(32)
    # 96 GB of float32 weights and two moments, written and read again at 0.1 GB/s.
    assert limits.save == limits.start == pytest.approx(300 + 2 * 960)
    # 32 GB of parameters and 16 GB of the version, at 0.5 GB/s.
    assert limits.publish == pytest.approx(300 + 96)


def test_an_adapter_that_is_sent_alone_adds_nothing_to_a_sync(tmp_path: Path) -> None:
    QWEN3_8B.write(tmp_path)
    whole = ["tiny=", f"learner.model.path={tmp_path}", "engine.dtype=bfloat16"]
    adapter = configured(*whole, "learner.model.lora.sync=adapter")
    assert time_limits(adapter, str(tmp_path)).sync == adapter.weights.sync_timeout_seconds
    merged = configured(*whole, "learner.model.lora.sync=merged")
    bytes_sent = 2 * QWEN3_8B.parameters
    allowed = 120 + bytes_sent / 2e8 + 2 * bytes_sent / 5e8
    assert time_limits(merged, str(tmp_path)).sync == pytest.approx(allowed)


def test_the_pull_of_a_version_from_another_node_has_its_bytes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def get(reference: Any, timeout: float) -> Any:
        waited.append(timeout)
        raise TimeoutError

    fake = SimpleNamespace(
        is_initialized=lambda: True, get=get, cloudpickle=SimpleNamespace(loads=lambda _: 0)
    )
    monkeypatch.setattr(actors, "ray", fake)
    address = f"cluster {base64.b64encode(b'reference').decode()}"
    for sizes in ([4], [30 * GB, 31 * GB]):
        with pytest.raises(TimeoutError):
            actors.open_object(address, sizes)
    assert waited == pytest.approx([60, 60 + 61 / 0.2])


@pytest.mark.parametrize("more", [0.0, 60.0])
def test_an_engine_that_loads_a_version_may_miss_a_heartbeat_for_its_bytes_time(more: float) -> None:
    class Loading:
        name = "rollout-0"
        asked = 0

        async def ping(self) -> None:
            self.asked += 1
            if self.asked == 1:
                await asyncio.Event().wait()  # the core is loading, and answers the next one

    member: Any = Loading()
    if more:
        asyncio.run(beat(member, 0.01, lambda: more))
        assert member.asked == 2
    else:
        with pytest.raises(PartLost, match=r"rollout-0 \(heartbeat\) did not answer within 0.01 s"):
            asyncio.run(beat(member, 0.01, lambda: more))
