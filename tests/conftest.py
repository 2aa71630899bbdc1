"""What holds for every test: nothing is fetched from a network and nothing is reported to anyone."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

# Set before any test module imports a library that reads them, and inherited by every process a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command does, before transformers is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray's default lets its workers wait for the other tester
# What a user's own runs may execute is remembered in his home; that of tests is not.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="manta-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

# How long an example takes says something about the machine, not about what is tested.
settings.register_profile("manta", deadline=None)
settings.load_profile("manta")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of several testers none is left with a long one in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
