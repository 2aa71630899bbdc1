"""The command line: a person's mistake is one line that says what, where and what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from transformers import AutoTokenizer

from deploy.cluster import connect
from deploy.cluster.janitor import TAG
from deploy.commands import envs_command
from deploy.run import drive
from deploy.run.model_checks import check_tokenizer
from envs import registry
from learner.model.tokenizer import build_tokenizer
from tests.deploy.command import Manta, command
from tests.deploy.small_run import RECIPE
from tests.envs import bad


@pytest.fixture
def manta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Manta:
    """Runs the command in this process; returns its exit code and what it wrote to stdout and stderr."""
    # This process is no driver: nobody is to clean up after it, and its environment stays as it is.
    monkeypatch.setattr(drive, "start_janitor", lambda *arguments: None)
    monkeypatch.setattr(drive, "temporary_of", lambda run: None)
    monkeypatch.setenv(TAG, "tests")
    return command(monkeypatch, capsys)


@pytest.fixture
def checkpoint(reference: Path, tmp_path: Path) -> Path:
    """A sound Hugging Face folder, to be broken."""
    return shutil.copytree(reference / "base", tmp_path / "model")


def mistake(ended: tuple[int, str, str]) -> str:
    """The one line on stderr of a command that was told something wrong."""
    code, out, err = ended
    assert (code, out) == (2, "")
    assert err.startswith("manta: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def refused(manta: Manta, tmp_path: Path) -> Callable[..., str]:
    """What `manta train` says to a recipe it refuses; nothing of a run may exist afterwards."""

    def run(*arguments: str) -> str:
        line = mistake(manta("train", *arguments, "--local", "--output-dir", str(tmp_path / "runs")))
        assert not (tmp_path / "runs").exists()
        return line

    return run


def of_model(path: object, *overrides: str) -> list[str]:
    """Arguments for a recipe that trains the checkpoint at `path` instead of a tiny model."""
    recipe = Path(RECIPE).read_text(encoding="utf-8")
    kept = re.sub(r"\[tiny\].*?\n\n", "", recipe, flags=re.DOTALL)
    file = Path(str(path)).parent / "of_model.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(kept, encoding="utf-8")
    return [str(file), f"learner.model.path={path}", *overrides]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.toml"], r"recipe nowhere\.toml: no such file"),
        (["frozen_lak"], "'frozen_lak' is neither a .toml file nor one of: .*frozen_lake"),
        ([], "name a recipe"),
        (["frozen_lake", "steps"], "'steps' is not of the form section.option=value"),
        ([RECIPE, "env.id=frozen_lak"], "unknown environment 'frozen_lak'; did you mean frozen_lake"),
        ([RECIPE, "env.options.sise=3"], "has no option 'sise'; its options: size,"),
        ([RECIPE, "evaluation.options.split=[odd]"], "split='[odd]' must be"),
        ([RECIPE, "env.id=CartPole-v1", "env.options={}"], "first prompt of CartPole-v1 has .* tokens"),
        (
            [RECIPE, "rollout.group_size=1"],
            "rollout.group_size=1 leaves .* without a baseline.*use a group of 2 or more",
        ),
        (
            [RECIPE, "env.options.size=6"],
            "first prompt of frozen_lake has 43 tokens.*rollout.context_tokens=40",
        ),
        (
            [RECIPE, "learner.model.lora.targets=['qproj']"],
            "'qproj' is no linear layer .* choose from: .*, q_proj,",
        ),
        (
            [RECIPE, "agent.parts=[{kind='tools',functions=['envs.builtin.frozen_lake:nothing']}]"],
            "agent.parts: tool 'envs.builtin.frozen_lake:nothing': module envs.builtin.frozen_lake has no function "
            "'nothing'",
        ),
        ([RECIPE, "evaluation.tasks=100"], "evaluation.tasks=100 is too large: .* only 4 different"),
        ([RECIPE, "--resume", "somewhere"], "leave the recipe away"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(
    refused: Callable[..., str], arguments: list[str], said: str
) -> None:
    assert re.search(said.replace("[odd]", r"\[odd\]"), refused(*arguments))


def test_a_checkpoint_that_is_none_is_refused(
    refused: Callable[..., str], tmp_path: Path, checkpoint: Path
) -> None:
    assert f"model {tmp_path / 'absent'}: no such folder" in refused(*of_model(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert f"model {tmp_path / 'empty'}: no configuration" in refused(*of_model(tmp_path / "empty"))
    (checkpoint / "tokenizer_config.json").rename(tmp_path / "aside")
    assert "no tokenizer" in refused(*of_model(checkpoint))


def test_a_checkpoint_cut_short_is_refused(refused: Callable[..., str], checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights}: broken file" in refused(*of_model(checkpoint))
    weights.unlink()
    assert "no weights" in refused(*of_model(checkpoint))


def test_a_checkpoint_of_the_hub_that_is_out_of_reach_is_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    recipe, *_ = of_model(tmp_path / "model")
    assert "manta-of-nobody/absent" in refused(recipe, "learner.model.path=manta-of-nobody/absent")


def test_a_checkpoint_with_fewer_positions_than_the_context_is_refused(
    refused: Callable[..., str], checkpoint: Path
) -> None:
    said = refused(*of_model(checkpoint, "rollout.context_tokens=64"))
    assert "40 positions" in said and "rollout.context_tokens=64" in said


def test_a_model_that_does_not_say_its_context_is_refused(
    refused: Callable[..., str], checkpoint: Path
) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "bloom"}', encoding="utf-8")
    said = refused(*of_model(checkpoint))
    assert f"model {checkpoint}: its family bloom states no max_position_embeddings" in said


def test_a_tokenizer_of_another_model_is_refused(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    own = AutoTokenizer.from_pretrained(checkpoint)
    rows = len(own)
    other = build_tokenizer(tmp_path / "other", ["one", "two", *registry.words("frozen_lake")])
    assert len(other) > rows
    shutil.copy(tmp_path / "other" / "tokenizer.json", checkpoint)
    said = refused(*of_model(checkpoint))
    assert f"model {checkpoint} has a vocabulary of {rows}, but its tokenizer one of {len(other)}" in said
    assert f"is id {len(other) - 1})" in said

    own.add_special_tokens({"extra_special_tokens": ["<|turn|>"]}, replace_extra_special_tokens=False)
    own.save_pretrained(checkpoint)
    check_tokenizer(str(checkpoint))  # a placeholder that no prompt holds
    own.chat_template = f"<|turn|>{own.chat_template}"
    own.save_pretrained(checkpoint)
    assert f"token '<|turn|>' is id {rows}" in refused(*of_model(checkpoint))


def test_a_model_may_have_more_rows_than_its_tokenizer(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] += 7
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    check_tokenizer(str(checkpoint))


TALKERS_ALONE = (  # as of a model that was never shown a tool
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% elif m['role'] == 'assistant' %}"
    "<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OFFERED = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
TOOL = "agent.parts=[{kind='tools',functions=['tests.envs.example_tools:double']}]"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (TALKERS_ALONE, r"leaves out a tool that is offered \(double\).*chat_template\.jinja"),
        (OFFERED + TALKERS_ALONE, "leaves out what a message of the role 'tool' says"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "runs more than"),
    ],
)
def test_a_template_that_cannot_say_what_will_be_said_is_refused(
    refused: Callable[..., str], manta: Manta, checkpoint: Path, template: str, said: str
) -> None:
    (checkpoint / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert re.search(said, refused(*of_model(checkpoint, TOOL, "agent.memory=full")))
    if "range" in template:
        limits = ("--context-tokens", "40", "--memory", "last")
        assert re.search(said, mistake(manta("eval", str(checkpoint), "--env", "frozen_lake", *limits)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("generation_config.json", "[]", "must hold a JSON object"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("config.json", {"model_type": "unheard_of", "auto_map": {"AutoConfig": "x.Y"}}, "custom code"),
    ],
)
def test_files_that_a_save_or_its_reader_stumbles_over_are_refused(
    refused: Callable[..., str], checkpoint: Path, name: str, content: str | dict[str, object], said: str
) -> None:
    file = checkpoint / name
    text = (
        content
        if isinstance(content, str)
        else json.dumps(json.loads(file.read_text(encoding="utf-8")) | content)
    )
    file.write_text(text, encoding="utf-8")
    assert said in refused(*of_model(checkpoint))


def test_a_prompt_longer_than_the_context_is_refused(refused: Callable[..., str], checkpoint: Path) -> None:
    said = refused(*of_model(checkpoint, "env.options.instructions=true"))
    assert "the first prompt of frozen_lake has" in said and "rollout.context_tokens=40" in said


def test_a_dashboard_port_in_use_is_refused(refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cluster.dashboard_port={port} is in use" in refused(RECIPE, f"cluster.dashboard_port={port}")


@pytest.mark.parametrize(
    ("address", "raised", "says"),
    [
        (
            "",
            Exception("The current node timed out.\nSee gcs.log"),
            "did not start on this machine: The current",
        ),
        (
            "10.0.0.1:6379",
            ConnectionError("no one"),
            "cluster.address='10.0.0.1:6379' cannot be joined: no one",
        ),
    ],
)
def test_a_ray_that_cannot_be_had_is_refused(
    manta: Manta, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, raised: Exception, says: str
) -> None:
    def refuse(**options: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    run = str(tmp_path / "runs")
    assert says in mistake(manta("train", RECIPE, f"cluster.address={address}", "--output-dir", run))
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_is_too_small_is_refused(
    manta: Manta, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(connect, "connect", lambda config, local: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    said = mistake(manta("train", RECIPE, "rollout.workers=64", "--output-dir", str(tmp_path / "runs")))
    assert "63 CPU missing (the run asks for 65 CPU)" in said and "lower rollout.workers" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_machine_that_is_too_small_is_refused(manta: Manta, tmp_path: Path) -> None:
    try:
        said = mistake(manta("train", RECIPE, "rollout.workers=4096", "--output-dir", str(tmp_path / "runs")))
    finally:
        ray.shutdown()
    assert "the cluster is too small" in said and "asks for 4097 CPU" in said
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_no_run_cannot_be_resumed(manta: Manta, tmp_path: Path) -> None:
    assert f"{tmp_path / 'absent'}: no such run folder" in mistake(
        manta("train", "--resume", str(tmp_path / "absent"))
    )
    assert f"{tmp_path} is not a run folder" in mistake(manta("train", "--resume", str(tmp_path)))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "config.json" in mistake(manta("train", "--resume", str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent/model/folder"], "model absent/model/folder: no such folder"),
        (["{base}", "--seeds", "5:5"], "--seeds '5:5' is not of the form A:B"),
        (["{base}", "--option", "size"], "--option 'size' is not of the form NAME=VALUE"),
        (["{base}", "--option", "sise=3"], "has no option 'sise'"),
        (["{base}", "--temperature", "-1"], "temperature"),
        (["{base}", "--max-tokens", "0"], "max_tokens"),
    ],
)
def test_an_evaluation_that_cannot_run_is_refused(
    manta: Manta, reference: Path, arguments: list[str], said: str
) -> None:
    filled = [argument.format(base=reference / "base") for argument in arguments]
    assert said in mistake(manta("eval", *filled, "--env", "frozen_lake"))


def test_the_environments_there_are_are_listed(manta: Manta) -> None:
    code, out, _ = manta("envs")
    assert code == 0
    assert re.search(r"frozen_lake +FrozenLake in words.* yes", out)
    told = " ".join(out.split())
    assert all(env_id in told for env_id in ("CartPole-v1", "Taxi-v4", "Blackjack-v1", "Pendulum-v1"))
    assert "Taxi-v3" not in told and "CartPole-v0" not in told
    assert all(f"{suite.prefix}... {suite.extra} " in told for suite in registry.SUITES)
    assert "program A foreign agent as an environment" in told


def test_a_suite_that_is_here_is_listed_with_its_ids(manta: Manta, monkeypatch: pytest.MonkeyPatch) -> None:
    lakes = registry.Suite("Here-", "here", "tests", "tests.envs.suite_of_here:lake", "A Suite")
    broken = registry.Suite("Broken-", "broken", "tests", "tests.no_such_module:lake", "Another")
    monkeypatch.setattr(registry, "SUITES", (lakes, broken))
    monkeypatch.setattr(envs_command, "gymnasium_ids", list)
    told = " ".join(manta("envs")[1].split())
    assert "A Suite Here-... here yes, 1 " in told and "A Suite: Here-Lake " in told
    assert "No module named 'tests.no_such_module'" in told and "Elsewhere-Lake" not in told


def test_a_sound_environment_is_told_so_and_one_that_is_not_row_by_row(
    manta: Manta, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = manta("check-env", "frozen_lake", "--option", "size=3", "--turns", "5")
    assert (code, out.splitlines()[0]) == (0, "frozen_lake: sound")
    assert re.search(
        r"first prompt \(seed 0\):\n.*G.*\nexample action:\n(left|right|up|down)\n", out, re.DOTALL
    )
    monkeypatch.setattr(registry, "_OURS", dict(registry._OURS))
    registry.register("loud", bad.DrawsGlobally)
    code, out, _ = manta("check-env", "loud")
    assert code == 1
    assert "generators" in out and "self.np_random" in out and "loud: 1 problem found" in out
    assert "has no option 'sise'" in mistake(manta("check-env", "frozen_lake", "--option", "sise=3"))
    assert "docs/foreign_agents.md" in mistake(manta("check-env", "program"))


def test_what_cannot_be_made_is_a_finding_and_an_id_that_is_none_a_mistake(manta: Manta) -> None:
    code, out, err = manta("check-env", "tests.envs.bad:CannotBeMade")
    assert (code, err) == (1, "") and "raises" in out and "words.txt" in out
    assert "not of the form module:Class" in mistake(manta("check-env", ":Foo"))
    assert "did you mean Sound" in mistake(manta("check-env", "tests.envs.bad:Sond"))


def test_demonstrations_are_written_and_told(manta: Manta, tmp_path: Path) -> None:
    code, out, _ = manta("demos", "frozen_lake", "-n", "4", "--out", str(tmp_path / "demos"))
    assert code == 0
    assert "success 1.000" in out and "4 episodes" in out and f"wrote {tmp_path / 'demos'}" in out


def test_a_job_is_checked_before_it_is_submitted(manta: Manta) -> None:
    assert "did you mean rollout.workers?" in mistake(manta("submit", RECIPE, "rollout.worker=2"))


@pytest.mark.parametrize(
    "command", ["train", "eval", "submit", "scale", "envs", "check-env", "demos", "doctor"]
)
def test_help_says_how_a_command_is_used(manta: Manta, command: str) -> None:
    code, out, _ = manta(command, "--help")
    assert code == 0
    assert "Example" in out and f"manta {command}" in out.split("Example")[1]


def test_help_lists_the_commands(manta: Manta) -> None:
    code, out, _ = manta("--help")
    assert code == 0
    assert all(command in out for command in ("train", "eval", "submit", "envs", "check-env", "demos"))


def test_the_doctor_finds_this_machine_fit(manta: Manta) -> None:
    code, out, _ = manta("doctor")
    assert code == 0 and "vllm" in out


def test_what_may_not_be_meant_is_said_and_the_run_begins(
    manta: Manta, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun: list[Path] = []
    monkeypatch.setattr(drive, "drive", lambda asked: begun.append(asked.folder))
    plain = ("learner.algorithm.loss.kind=reinforce", "buffer.max_lag=1", "evaluation.tasks=0")
    code, _, err = manta("train", RECIPE, *plain, "--run-dir", str(tmp_path / "run"))
    assert (code, begun, err.count("\n")) == (0, [tmp_path / "run"], 1)
    assert err.startswith("note: off-policy samples (up to 1 versions old) are treated as on-policy")
