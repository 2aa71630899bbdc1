"""One uninterrupted synchronous run, played once, for every test that compares with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.small_run import configured, train


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    train(configured(), folder)
    return folder
