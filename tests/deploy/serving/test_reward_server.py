"""A reward model behind its server is a reward of an environment: the scores that the learner gave, many at once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.assembly.stage_data import gather
from deploy.commands.scores import score_run
from deploy.config.config_errors import ConfigError
from deploy.report.metrics import read_metrics, stage_folder
from deploy.run.preflight import check
from deploy.serving.loopback import address, listen
from deploy.serving.reward_scorer import RewardScorer, Unscorable
from deploy.serving.reward_server import RewardServer, Scorer
from envs.rewards.reward_model import KEY, reward_model
from envs.rewards.rewards import Reward, Said, reward_range, rewards_of
from envs.served_model import NoAnswer
from rollout.wire.schema import decode
from tests.deploy.command import command
from tests.deploy.labels.stored import OPENING, group, stored
from tests.deploy.run.test_stages import spoken, written
from tests.deploy.small_run import configured, train

TALK = spoken("left", "right")


class Counting:
    """Scores a conversation by its number of messages, and keeps how many were computed at once."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.first, self.go_on = threading.Event(), threading.Event()
        self.read = threading.Semaphore(0)

    def tokens(self, conversation: Sequence[dict[str, Any]]) -> list[int]:
        if not conversation:
            raise Unscorable("it says nothing")
        self.read.release()
        return [0] * len(conversation)

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        self.batches.append(len(rows))
        self.first.set()
        assert self.go_on.wait(30)
        return [float(len(row)) for row in rows]


@contextmanager
def serving(scorer: Scorer, key: str = "secret", port: int = 0) -> Iterator[str]:
    """Serve in a thread; yields the address."""
    server = RewardServer(scorer, key)
    with listen(port) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(listener)), daemon=True)
        thread.start()
        try:
            yield address(listener)
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")


def test_requests_that_wait_are_computed_together_and_each_gets_its_own() -> None:
    scorer = Counting()
    with serving(scorer) as url, ThreadPoolExecutor(9) as threads:
        asked = [threads.submit(reward_model, TALK, base_url=url)]
        assert scorer.first.wait(30)
        asked += [threads.submit(reward_model, TALK * length, base_url=url) for length in range(2, 10)]
        for _ in range(9):  # all are read, and eight wait for the first, whose computation ends only now
            assert scorer.read.acquire(timeout=30)
        scorer.go_on.set()
        assert [each.result(30) for each in asked] == [2.0 * length for length in range(1, 10)]
    assert scorer.batches[0] == 1 and len(scorer.batches) < 9 and sum(scorer.batches) == 9


def test_what_cannot_be_scored_costs_its_episode_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Counting()
    scorer.go_on.set()
    with serving(scorer) as url:
        with pytest.raises(NoAnswer, match=r"status 400: .*it says nothing"):
            reward_model([], base_url=url)
        assert reward_model(TALK, base_url=url) == 2.0
        monkeypatch.setenv(KEY, "another")
        with pytest.raises(NoAnswer, match=rf"status 401: .*{KEY}"):
            reward_model(TALK, base_url=url)
    with pytest.raises(NoAnswer, match="gave no score"):
        reward_model(TALK, base_url=url, retries=0, seconds=5)


def test_too_little_memory_fails_its_requests_and_any_other_error_ends_the_server() -> None:
    class Failing(Counting):
        def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
            if len(rows[0]) == 4:
                raise RuntimeError("out of memory")
            if len(rows[0]) == 6:
                raise KeyError("a mistake")
            return super().scores(rows)

    scorer = Failing()
    scorer.go_on.set()

    def ask(url: str) -> None:
        with pytest.raises(NoAnswer, match=r"status 500: .*out of memory"):
            reward_model(TALK * 2, base_url=url, retries=0)
        assert reward_model(TALK, base_url=url) == 2.0
        with pytest.raises(NoAnswer, match="gave no score"):
            reward_model(TALK * 3, base_url=url, retries=0)

    async def until_the_end() -> None:
        with listen(0) as listener:
            asking = asyncio.create_task(asyncio.to_thread(ask, address(listener)))
            with pytest.raises(KeyError, match="a mistake"):
                await RewardServer(scorer, "secret").serve(listener)
            await asking

    asyncio.run(asyncio.wait_for(until_the_end(), 60))


def test_a_reward_waits_for_a_server_that_is_started_again_with_another_model() -> None:
    class Twice(Counting):
        def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
            return [2 * score for score in super().scores(rows)]

    first, second = Counting(), Twice()
    for each in (first, second):
        each.go_on.set()
    with serving(first) as url:
        assert reward_model(TALK, base_url=url) == 2.0
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(reward_model, TALK, base_url=url, retries=5)
        with serving(second, port=int(url.rpartition(":")[2])):
            assert asked.result(60) == 4.0


def test_a_port_that_is_taken_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    manta = command(monkeypatch, capsys)
    with listen(0) as listener:
        port = listener.getsockname()[1]
        code, _, error = manta("serve-reward", str(tmp_path), "--port", str(port))
    assert (code, error) == (
        2,
        f"manta: port {port}: Address already in use; choose another with --port, 0 for a free one\n",
    )


def test_a_recipes_reward_model_says_any_number_of_the_whole_conversation() -> None:
    scorer = Counting()
    scorer.go_on.set()
    with serving(scorer) as url:
        reward = Reward.of({"kind": "model", "base_url": url, "weight": 0.5})
        assert reward(Said("right", None, {}, TALK * 3, posed=1)) == 6.0
        assert reward_range([reward]) == (-float("inf"), float("inf"))
    with pytest.raises(ValueError, match="reward model needs the option 'base_url'"):
        rewards_of("model")


def test_a_run_makes_a_reward_model_of_pairs_and_its_server_says_the_learners_scores(tmp_path: Path) -> None:
    prompts = [
        f"{one} {other}" for one in ("left", "right", "up") for other in ("left", "down", "right", "up")
    ]
    rows = [
        {"prompt": prompt, "chosen": "up", "rejected": "down", "margin": place % 3}
        for place, prompt in enumerate(prompts)
    ]
    source = written(tmp_path / "pairs.jsonl", rows)
    optim = "optim={learning_rate=1e-2}, head_optim={learning_rate=1e-1}"
    stage = f"{{kind='reward_model', {source}, epochs=6, pairs_per_step=5, {optim}, heldout_share=0.25, margin=0.1}}"
    config = configured(
        "steps=0", "evaluation.tasks=0", f"stages=[{stage}]", "tiny.words=['go', 'up', 'down']"
    )
    check(config)
    train(config, tmp_path / "run")
    metrics = read_metrics(stage_folder(tmp_path / "run", 0))
    assert len(metrics) == 12 and metrics[-1]["heldout_accuracy"] == 1.0
    folder = tmp_path / "run" / "checkpoints" / "version-00000000" / "model"
    scorer = RewardScorer(folder)
    (batch, *_) = gather(config, 0, str(folder))
    better, worse = decode(batch).trajectories
    talks = [spoken(prompts[0], "up"), spoken(prompts[0], "down")]
    for talk, episode in zip(talks, (better, worse), strict=True):
        (turn,) = episode.turns
        assert scorer.tokens(talk) == [*turn.prompt_ids, *turn.action_ids]
    alone = [scorer.scores([scorer.tokens(talk)])[0] for talk in talks]
    assert alone[0] > alone[1]
    with serving(scorer) as url:
        served = [reward_model(talk, base_url=url) for talk in talks]
    assert served == pytest.approx(alone, abs=1e-6)
    assert scorer.scores([scorer.tokens(talk) for talk in talks * 3]) == pytest.approx(alone * 3, abs=1e-5)
    with pytest.raises(Unscorable, match="no turn of an assistant"):
        scorer.tokens(spoken("left"))
    with pytest.raises(ConfigError, match="holds no reward model"):
        RewardScorer(tmp_path)
    run = stored(tmp_path / "labelled", group(0, [["up"], ["down", "right"], ["up" * 200]]))
    count = score_run(run, [folder, folder], tmp_path / "scores.jsonl", groups=2)
    assert (count.scored, count.left_out) == (2, 1)  # the third is longer than the model's context
    answered = [*OPENING, {"role": "assistant", "content": "up"}]
    asked_again = [*OPENING, *spoken("sure?", "right")]
    asked_again.insert(2, {"role": "assistant", "content": "down"})
    for line, talk in zip((tmp_path / "scores.jsonl").open(), (answered, asked_again), strict=True):
        wanted = scorer.scores([scorer.tokens(talk)])
        assert json.loads(line)["score"] == pytest.approx(wanted * 2, abs=1e-5)


def test_a_language_model_is_no_reward_model(reference: Path) -> None:
    with pytest.raises(ConfigError, match="is a language model"):
        RewardScorer(reference / "checkpoints" / "version-00000002" / "model")


def test_a_reward_model_ends_its_run() -> None:
    with pytest.raises(ConfigError, match=r"stages\.0 makes a reward model, which cannot play"):
        configured("stages=[{kind='reward_model'}]", "steps=2")
