"""Every part, killed and frozen, at random moments, during a weight sync and during a checkpoint, on several raylets.

One run of small scripted episodes goes on for ever on a cluster of raylets of this machine; one injection follows the
other, each when the run has recovered from the last. The learner has two ranks: "learner" is rank 0, "rank" the other.
What the run lost, repeated or sampled again is read from its ledger, from the learner's own log of the groups it
consumed, and from the engines' log of the turns they sampled. The engine of the real vLLM is hit in real.py.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.faults.run import Accounts, Driver, accounts, children, command_of, until

KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM  # TERM: the notice of a preemption
GROUPS_PER_STEP = 4
RECOVERY_SECONDS = 180.0
FROZEN_SECONDS = 4.0
OVERRIDES = (
    "steps=1000000",
    "evaluation.tasks=0",
    "stages.0.source.episodes=8",
    f"buffer.groups_per_step={GROUPS_PER_STEP}",
    "buffer.max_lag=1",
    "rollout.workers=2",
    "rollout.concurrent_groups=4",
    "checkpoint.every_steps=4",
    "env.host.where=process",
    "env.host.step_seconds=3",
    "env.host.reset_seconds=3",
    "env.options.size=4",
    "env.options.max_turns=12",
    "buffer.max_failed_share=1",
    "learner.ranks=2",
    "cluster.learner_cpus=0",
    "supervision.heartbeat_interval_seconds=0.5",
    f"supervision.heartbeat_timeout_seconds={FROZEN_SECONDS}",
    "supervision.max_restarts=100000",
)


@dataclass(frozen=True)
class Kind:
    """What is hit, with what, when: one of PARTS, one of MOMENTS."""

    part: str
    signal: signal.Signals
    moment: str

    @property
    def name(self) -> str:
        return f"{self.part} {self.signal.name} {self.moment}"


PARTS = ("rollout", "environment", "replay buffer", "learner", "rank", "driver", "node")
MOMENTS = ("random", "sync", "checkpoint")
NOTICES = tuple(Kind("rollout", TERM, moment) for moment in MOMENTS)
KINDS = tuple(Kind(*each) for each in itertools.product(PARTS, (KILL, STOP), MOMENTS)) + NOTICES


@dataclass(frozen=True)
class Outcome:
    """One injection: how long the run took to go on, and what it sampled again."""

    kind: Kind
    seconds: float
    tokens_again: int
    error: str = ""


class Raylets:
    """A head and some worker nodes, all on this machine. has: what each worker node has beside one CPU."""

    def __init__(self, workers: int, **has: Any) -> None:
        from ray.cluster_utils import Cluster

        health = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 1000,
            "health_check_timeout_ms": 1000,
            "health_check_failure_threshold": 4,
        }
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": health},
        )
        self._has = has
        self._nodes = [self._add() for _ in range(workers)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, **self._has)

    def has(self, node: str) -> bool:
        """Whether this is one of the worker nodes."""
        return node in [candidate.node_id for candidate in self._nodes]

    def hit(self, node: str, number: signal.Signals) -> None:
        """Send a worker node's raylet a signal."""
        (found,) = [candidate for candidate in self._nodes if candidate.node_id == node]
        raylet = found.all_processes["raylet"][0].process
        raylet.send_signal(number)
        if number == KILL:
            raylet.wait(
                10
            )  # its workers look whether it is there, and a process that nobody waited for still is

    def replace(self, node: str) -> None:
        """Take a dead or frozen node away for good and start another."""
        for candidate in list(self._nodes):
            if candidate.node_id == node:
                self._cluster.remove_node(candidate, allow_graceful=False)
                self._nodes.remove(candidate)
                self._nodes.append(self._add())

    def close(self) -> None:
        for node in self._nodes:
            self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


class Injector:
    """Hits the run and watches it go on."""

    def __init__(self, driver: Driver, raylets: Raylets, seed: int) -> None:
        self._driver = driver
        self._raylets = raylets
        self._random = random.Random(seed)

    def inject(self, kind: Kind) -> Outcome:
        """One injection, from a run that moves to a run that moves."""
        driver = self._driver
        until(self._steady, RECOVERY_SECONDS, "a steady run")
        self._steps(2)
        before = len(driver.sampled())
        self._await(kind.moment)
        hit = time.time()
        began = time.monotonic()
        try:
            again = getattr(self, "_hit_" + kind.part.replace(" ", "_"))(kind.signal)
            until(again, RECOVERY_SECONDS, f"the replacement after {kind.name}")
            self._steps(1)
        except (TimeoutError, LookupError) as error:
            return Outcome(kind, time.monotonic() - began, 0, f"{error}; {driver.tail(3)}")
        seconds = time.monotonic() - began
        until(self._steady, RECOVERY_SECONDS, "a steady run")
        return Outcome(kind, seconds, self._sampled_again(before, hit))

    def _hit_rollout(self, number: signal.Signals) -> Callable[[], bool]:
        part = self._random.choice(self._rollouts())
        os.kill(part["pid"], number)
        return lambda: len(self._rollouts()) == 2 and part["pid"] not in [p["pid"] for p in self._rollouts()]

    def _hit_environment(self, number: signal.Signals) -> Callable[[], bool]:
        replicas = [
            child
            for part in self._rollouts()
            for fork_server in children(part["pid"])
            if "envs.hosting.fork_server" in command_of(fork_server)
            for child in children(fork_server)
            if "envs.hosting.fork_server" in command_of(child)  # and not what an environment has started
        ]
        if not replicas:
            raise LookupError("no environment process was found")
        replica = self._random.choice(replicas)
        os.kill(replica, number)
        # An idle one is missed by nobody until an episode asks it: what counts is that the others go on.
        return lambda: number == STOP or "Z" in _state(replica)

    def _hit_replay_buffer(self, number: signal.Signals) -> Callable[[], bool]:
        return self._hit_fixed("replay buffer", number)

    def _hit_learner(self, number: signal.Signals) -> Callable[[], bool]:
        return self._hit_fixed("learner", number)

    def _hit_rank(self, number: signal.Signals) -> Callable[[], bool]:
        return self._hit_fixed("learner-1", number)

    def _hit_fixed(self, name: str, number: signal.Signals) -> Callable[[], bool]:
        pid = self._part(name)["pid"]
        os.kill(pid, number)
        return lambda: self._part(name)["pid"] != pid

    def _hit_driver(self, number: signal.Signals) -> Callable[[], bool]:
        driver = self._driver
        driver.signal(number)
        if number == STOP:
            time.sleep(2 * FROZEN_SECONDS)
            driver.signal(signal.SIGCONT)
            return lambda: True
        driver.wait(10)
        pids = {part["pid"] for part in driver.roster()}
        driver.start()
        return lambda: self._steady() and not pids & {part["pid"] for part in driver.roster()}

    def _hit_node(self, number: signal.Signals) -> Callable[[], bool]:
        part = self._random.choice([p for p in self._rollouts() if self._raylets.has(p["node"])])
        node = part["node"]
        self._raylets.hit(node, number)

        def gone() -> bool:
            return len(self._rollouts()) == 2 and node not in [p["node"] for p in self._rollouts()]

        def again() -> bool:
            if gone():
                self._raylets.replace(node)
                return True
            return False

        return again

    def _rollouts(self) -> list[dict[str, Any]]:
        return [
            p for p in self._driver.roster() if p["part"].startswith("rollout") and p["state"] == "serving"
        ]

    def _part(self, name: str) -> dict[str, Any]:
        return next(part for part in self._driver.roster() if part["part"] == name)

    def _steady(self) -> bool:
        return self._driver.alive() and len(self._rollouts()) == 2

    def _steps(self, count: int) -> None:
        """Wait for so many more learner steps."""
        until(self._driver.steps_from_now(count), RECOVERY_SECONDS, f"{count} learner steps")

    def _await(self, moment: str) -> None:
        if moment == "random":
            time.sleep(self._random.uniform(0, 0.7))
        else:
            until(lambda: self._driver.at(moment), RECOVERY_SECONDS, f"the moment {moment!r}", poll=0.002)
            time.sleep(self._random.uniform(0, 0.05))

    def _sampled_again(self, before: int, hit: float) -> int:
        seen: set[int] = set()
        again = 0
        for position, (when, seed, tokens) in enumerate(self._driver.sampled()):
            if seed in seen and position >= before and when >= hit:
                again += tokens
            seen.add(seed)
        return again


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def run(
    folder: Path,
    kinds: Sequence[Kind],
    say: Callable[[str], None] = print,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> tuple[list[Outcome], Accounts, int]:
    """Inject every kind in turn; returns the outcomes, the accounts at the end, and the driver's last exit status."""
    raylets = Raylets(workers=3)
    driver = Driver(folder, [*OVERRIDES, *overrides, f"cluster.address={raylets.address}"])
    outcomes = []
    try:
        driver.start()
        injector = Injector(driver, raylets, seed)
        for number, kind in enumerate(kinds):
            outcomes.append(injector.inject(kind))
            last = outcomes[-1]
            how = last.error or f"{last.seconds:.1f} s, {last.tokens_again} tokens again"
            say(f"{number + 1}/{len(kinds)} {kind.name}: {how}")
            if not driver.alive():
                say(driver.tail())
                break
        driver.stop()
        status = finish(driver)
    finally:
        driver.stop()
        raylets.close()
    return outcomes, accounts(driver, GROUPS_PER_STEP), status


def finish(driver: Driver, seconds: float = RECOVERY_SECONDS) -> int:
    """Let the stopped run go on to an end that is near, so that nothing is left in flight."""
    stored = driver.folder / "config.json"
    config = json.loads(stored.read_text(encoding="utf-8"))
    config["steps"] = max(row["version"] for row in driver.consumed()) + 10
    stored.write_text(json.dumps(config), encoding="utf-8")
    driver.start(stored=True)
    return driver.wait(seconds)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """One row a part, signal and moment, in Markdown."""
    rows = [
        "| part | signal | moment | injected | recovered | median s | worst s | tokens again, mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        good = [outcome.seconds for outcome in own if not outcome.error]
        again = sum(outcome.tokens_again for outcome in own) / len(own)
        shown = (f"{median(good):.1f} | {max(good):.1f}") if good else "- | -"
        rows.append(
            f"| {kind.part} | {kind.signal.name} | {kind.moment} | {len(own)} | {len(good)} | {shown} | {again:.1f} |"
        )
    return rows
