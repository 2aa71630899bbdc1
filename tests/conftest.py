"""What holds for every test: nothing is fetched from a network and nothing is reported to anyone."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Set before any test module imports a library that reads them, and inherited by every process a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command does, before transformers is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

# How long an example takes says something about the machine, not about what is tested.
settings.register_profile("manta", deadline=None)
settings.load_profile("manta")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of several testers none is left with a long one in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
