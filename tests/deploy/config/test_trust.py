"""A stored folder is data: what its configuration would execute needs the user's word, and is named without it."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploy import cli
from deploy.cluster.control import driving
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config, parse
from deploy.config.trust import executed, executed_by_evaluation, remember, require_trust
from deploy.run import drive, evaluate
from tests.deploy.small_run import RECIPE, configured

SHELL = {"command": "/bin/sh", "args": ["-c", "touch executed"]}
Nested = dict[str, Any]


def tools(**given: Any) -> Nested:
    return {"agent": {"parts": [{"kind": "tools", **given}]}}


def environment(env_id: str, **options: Any) -> Nested:
    return {"env": {"id": env_id, "options": options}}


HOSTILE = {
    "server": (tools(servers=[SHELL]), "/bin/sh"),
    "second server": (tools(servers=[{"command": "true"}, SHELL]), "/bin/sh"),
    "function": (tools(functions=["envs.tools.python_tool:python", "os:system"]), "os:system"),
    "unsafe tool": (tools(functions=["envs.tools.python_tool:python_unsafe"]), "python_unsafe"),
    "program": (environment("program", command=["/bin/sh", "-c", "id"]), "/bin/sh"),
    "function agent": (environment("program", function="agent:act", reward="agent:paid"), "agent:paid"),
    "module": (environment("hostile:Env"), "hostile:Env"),
    "module that registers": (environment("hostile:Env-v0"), "hostile:Env-v0"),
    "game of a module": (environment("pettingzoo/hostile:game"), "hostile:game"),
    "opponent": (environment("pettingzoo/connect_four_v3", opponent="hostile:move"), "hostile:move"),
    "unicode": (environment("pettingzoo/connect_four_v3", opponent="b\u00f6se:zug"), "b\\u00f6se:zug"),
    "served": (
        environment("textarena/TicTacToe-v0", opponent="https://evil.test/v1"),
        "https://evil.test/v1",
    ),
    "sandbox off": (environment("programming", allow_unsafe=True), "allow_unsafe"),
    "browser": (environment("browser", executable="/tmp/chromium"), "/tmp/chromium"),
    "nested": (environment("frozen_lake", deep=[{"allow_unsafe": 1}]), "allow_unsafe"),
    "evaluation": ({"evaluation": {"options": {"opponent": "hostile:move"}}}, "hostile:move"),
    "scheduler of vLLM": ({"engine": {"args": {"scheduler_cls": "hostile.Scheduler"}}}, "hostile.Scheduler"),
    "connector of vLLM": (
        {"engine": {"args": {"kv_transfer_config": {"kv_connector_module_path": "hostile"}}}},
        "hostile",
    ),
    "model's code": (
        {"tiny": None, "learner": {"model": {"path": "somebody/own", "trust_remote_code": True}}},
        "somebody/own",
    ),
    "cluster": ({"cluster": {"address": "ray://evil.test:10001"}}, "ray://evil.test:10001"),
}


def stored(folder: Path, changes: Nested) -> Path:
    """A run folder as somebody else hands it over."""
    tree = configured().model_dump(mode="json")
    for section, options in changes.items():
        tree[section] = None if options is None else tree[section] | options
    folder.mkdir()
    (folder / "config.json").write_text(parse(tree, "test").model_dump_json(), encoding="utf-8")
    (folder / "ledger.sqlite").touch()
    return folder


def manta(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["manta", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_stored_run_would_execute_is_refused_by_name(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, named = HOSTILE[what]
    folder = stored(tmp_path / "theirs", changes)
    driven: list[Path] = []
    monkeypatch.setattr(drive, "drive", lambda asked: driven.append(asked.folder))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.py").write_text("open('executed', 'w')", encoding="utf-8")
    env_id = run_folder.open_existing(folder).env.id
    commands: list[tuple[object, ...]] = [
        ("train", "--resume", folder),
        ("train", RECIPE, "--run-dir", folder),
    ]
    if what != "cluster":  # nothing of an evaluation, which has no cluster
        commands += [("eval", folder), ("eval", "somebody/else", "--like", folder)]
    if what not in ("cluster", "module", "module that registers", "game of a module"):  # the user's own word
        commands.append(("eval", folder, "--env", env_id))
    for command in commands:
        assert manta(monkeypatch, *command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and named in said and "--trust" in said
    assert not driven and not (tmp_path / "executed").exists()

    assert manta(monkeypatch, "train", "--resume", folder, "--trust") == 0
    assert manta(monkeypatch, "train", "--resume", folder) == 0, "the word is remembered"
    folder.rename(tmp_path / "elsewhere")
    assert manta(monkeypatch, "train", "--resume", tmp_path / "elsewhere") == 2, "of this folder alone"
    assert driven == [folder, folder]


def test_a_word_covers_what_was_shown_and_nothing_that_came_later(tmp_path: Path) -> None:
    folder = stored(tmp_path / "run", tools(servers=[SHELL]))
    evaluate.conditions_of(str(folder), "frozen_lake", trusted=True)
    evaluate.conditions_of(str(folder / "checkpoints" / "version-00000001"), "frozen_lake")
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tree["agent"]["parts"][0]["servers"][0]["args"] = ["-c", "something else"]
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match="something else"):
        evaluate.conditions_of(str(folder), "frozen_lake")


def test_a_run_of_ones_own_recipe_goes_on_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven: list[bool] = []
    monkeypatch.setattr(drive, "drive", lambda asked: driven.append(asked.resume))
    part = "agent.parts=[{kind='tools',functions=['os:getpid']}]"
    config, folder = load_config(RECIPE, [part]), tmp_path / "mine"
    run_folder.create(config, folder)
    assert manta(monkeypatch, "train", "--resume", folder) == 0
    # A job that is started again on another host, where nothing is remembered, names the recipe once more.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another host"))
    assert manta(monkeypatch, "train", "--resume", folder) == 2
    assert manta(monkeypatch, "train", RECIPE, part, "--run-dir", folder) == 0
    # What the user moves it to is his own word.
    plain = stored(tmp_path / "plain", {})
    assert manta(monkeypatch, "train", "--resume", plain, "cluster.address='10.0.0.1:6379'") == 0
    assert driven == [True] * 3


def test_data_that_ships_with_manta_is_no_code() -> None:
    assert executed(load_config("smollm2_sums", [])) == []
    own = load_config("smollm2_sums", ["env.options.rewards=sample:sums"])
    assert executed(own) == ['env.options.rewards="sample:sums"']


def test_a_plain_run_asks_for_nothing() -> None:
    for recipe in ("frozen_lake", "rloo", RECIPE):
        assert executed(load_config(recipe)) == []
    isolated = parse(configured().model_dump() | tools(functions=["envs.tools.python_tool:python"]), "test")
    assert executed(isolated) == executed_by_evaluation(isolated, "frozen_lake") == []


@pytest.mark.parametrize("content", [b"\x80\x81\xff", b"[" * 100_000, b"[]", b"{", b"null"])
def test_a_configuration_that_is_none_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json") as refused:
        run_folder.open_existing(tmp_path)
    assert "\n" not in str(refused.value)


def test_words_given_at_once_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    together, words = threading.Barrier(8), [f"command {number}" for number in range(8)]

    def give(word: str) -> None:
        together.wait()
        remember(tmp_path, [word])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(give, words))
    require_trust(tmp_path, words, trusted=False)  # it asks for none of them


def test_a_run_folder_is_made_private_whoever_made_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert run_folder.make_private(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_place_that_may_not_be_written_is_one_line(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *given: object, **more: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    config = configured()
    for method in ("mkdir", "open"):
        monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(ConfigError, match="choose a folder that you may write"):
        run_folder.create(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="choose a folder that you may write"), driving(tmp_path):
        pass
