"""The page's server by an HTTP client, and killed while judgements come in."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import httpx
import pytest
from starlette.testclient import TestClient

from deploy.labels.judgements import Labels
from deploy.labels.pool import Pool
from deploy.labels.scores import ScoreFile, write_scores
from deploy.labels.server import LabelPage
from tests.deploy.labels.stored import group, stored

EVIL = '<img src=x onerror="fetch(1)">'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return stored(tmp_path / "run", group(0, [["4", "yes"], ["5", EVIL]]), group(1, [["1"], ["2"], ["3"]]))


@pytest.fixture
def page(run: Path) -> Iterator[TestClient]:
    with closing(Labels(run)) as labels:
        app = LabelPage(Pool(run, 100), labels, overlap=0.0).app()
        yield TestClient(app, headers={"authorization": f"Bearer {labels.key()}"})


def judgement(
    pair: dict[str, Any], verdict: str = "left", annotator: str = "ann", **more: Any
) -> dict[str, Any]:
    left, right = (side["episode"] for side in pair["sides"])
    said = {"group_id": pair["group_id"], "attempt": pair["attempt"], "left": left, "right": right}
    return {"id": str(uuid4()), "annotator": annotator, "verdict": verdict, **said, **more}


def asked(page: TestClient, annotator: str = "ann") -> Any:
    return page.get("/api/next", params={"annotator": annotator}).json()


def rows(run: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(run / "labels" / "labels.sqlite")) as db:
        return db.execute("SELECT id, annotator, verdict FROM judgements ORDER BY rowid").fetchall()


def test_every_pair_is_asked_until_all_are_judged_and_a_reload_shows_the_same_one(
    page: TestClient, run: Path
) -> None:
    seen, ids = set(), []
    while pair := asked(page)["pair"]:
        assert asked(page)["pair"] == pair
        said = judgement(pair, thumbs=[{"episode": pair["sides"][0]["episode"], "turn": 0, "up": False}])
        assert page.post("/api/judgements", json=said).json() == {"stored": said["id"]}
        seen.add((pair["group_id"], *sorted(side["episode"] for side in pair["sides"])))
        ids.append(said["id"])
    assert seen == {(0, 0, 1), (1, 0, 1), (1, 0, 2), (1, 1, 2)}
    assert [row[0] for row in rows(run)] == ids
    assert asked(page)["counts"] == {"mine": 4, "all": 4, "annotators": 1, "agreement": None}


def test_scores_that_come_while_the_page_is_up_decide_the_next_pair(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    with closing(Labels(run)) as labels:
        app = LabelPage(Pool(run, 100), labels, overlap=0.0, scores=ScoreFile(file)).app()
        page = TestClient(app, headers={"authorization": f"Bearer {labels.key()}"})
        assert asked(page)["pair"] is not None  # at random
        for equal in (0, 2), (1, 2):  # of group 1: all other pairs are certain
            write_scores(file, {(1, 0, place): [9.0 * (place not in equal)] for place in range(3)})
            assert {side["episode"] for side in asked(page)["pair"]["sides"]} == {*equal}
        file.write_text("{}\n")
        answer = page.get("/api/next", params={"annotator": "ann"})
        assert (
            answer.status_code == 500 and "scores.jsonl:1: group_id Field required" in answer.json()["error"]
        )


def test_what_is_sent_again_counts_once_and_contradictions_are_refused(page: TestClient, run: Path) -> None:
    said = judgement(asked(page)["pair"], "tie", comment="both are right")
    assert [page.post("/api/judgements", json=said).status_code for _ in range(3)] == [200, 200, 200]
    for other in (
        {"verdict": "left"},
        {"id": str(uuid4())},
    ):  # other words under the id; the pair a second time
        refused = page.post("/api/judgements", json=said | other)
        assert refused.status_code == 409, refused.text
    mirrored = said | {"id": str(uuid4()), "left": said["right"], "right": said["left"]}
    assert page.post("/api/judgements", json=mirrored).status_code == 409
    assert (
        page.post("/api/judgements", json=said | {"id": str(uuid4()), "annotator": "ben"}).status_code == 200
    )
    assert rows(run) == [(said["id"], "ann", "tie"), (rows(run)[1][0], "ben", "tie")]


def test_two_annotators_are_not_shown_the_same_pair_at_once(page: TestClient) -> None:
    shown = [asked(page, name)["pair"] for name in ("ann", "ben", "cleo", "dora")]
    places = [(pair["group_id"], *sorted(side["episode"] for side in pair["sides"])) for pair in shown]
    assert len(set(places)) == 4


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        ({"verdict": "best"}, 400, "verdict: Input should be 'left', 'right'"),
        ({"annotator": "  "}, 400, "annotator: String should have at least 1 character"),
        ({"id": "1; DROP TABLE judgements"}, 400, "id: String should match pattern"),
        ({"extra": 1}, 400, "extra: Extra inputs are not permitted"),
        ({"group_id": 7}, 404, "the run has no pair (7, 0, 0, 1)"),
        ({"right": 0, "left": 0}, 404, "the run has no pair (0, 0, 0, 0)"),
        ({"thumbs": [{"episode": 0, "turn": 2, "up": True}]}, 400, "of turns of the pair"),
        ({"corrections": [{"episode": 2, "turn": 0, "text": "4"}]}, 400, "of turns of the pair"),
        ({"corrections": [{"episode": 0, "turn": 0, "text": "4"}] * 2}, 400, "one of each turn"),
        ({"comment": "\ud800"}, 400, "comment: "),
    ],
)
def test_a_judgement_that_is_none_is_refused_in_words(
    page: TestClient, run: Path, changed: dict[str, Any], status: int, message: str
) -> None:
    said = judgement({"group_id": 0, "attempt": 0, "sides": [{"episode": 0}, {"episode": 1}]}) | changed
    answer = page.post("/api/judgements", content=json.dumps(said))
    assert answer.status_code == status and message in answer.json()["error"], answer.text
    assert rows(run) == []


def test_without_the_key_nothing_of_the_run_is_told(page: TestClient, run: Path) -> None:
    for key in ("", "Bearer wrong", "Bearer \u00e9"):
        headers = {"authorization": key.encode("latin-1")}
        assert page.get("/api/next?annotator=ann", headers=headers).status_code == 401
        assert page.post("/api/judgements", json={}, headers=headers).status_code == 401
    assert page.get("/").status_code == 200  # the page itself: it has no word of the run
    assert EVIL not in page.get("/").text
    assert page.post("/api/judgements", content=b"{" * 100).status_code == 400
    mode = (run / "labels" / "key").stat().st_mode
    assert oct(mode & 0o777) == "0o600" and (run / "labels").stat().st_mode & 0o077 == 0


def test_foreign_text_arrives_as_data_and_the_page_may_run_no_inline_code(page: TestClient) -> None:
    page_policy = page.get("/").headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'" in page_policy and "unsafe" not in page_policy
    answer = page.get("/api/next", params={"annotator": "ann"})
    assert answer.headers["content-type"] == "application/json"
    sources = [page.get(path).text for path in ("/label.js", "/outbox.js")]
    for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert not [source for source in sources if markup in source]


SERVER = """
import sys
from pathlib import Path
from deploy.labels.judgements import Labels
from deploy.labels.pool import Pool
from deploy.labels.scores import ScoreFile, write_scores
from deploy.labels.server import LabelPage, serve
from deploy.serving.loopback import listen, serve_until_told
labels, listener = Labels(Path(sys.argv[1])), listen(int(sys.argv[2]))
print("ready", flush=True)
serve_until_told(serve(LabelPage(Pool(Path(sys.argv[1]), 100), labels, 0.0), listener))
"""


def served(run: Path, port: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", SERVER, str(run), str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_no_judgement_is_lost_or_counted_twice_by_kills_in_the_middle_of_twenty(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with closing(Labels(run)) as labels:
        headers = {"authorization": f"Bearer {labels.key()}"}
    pair = {"group_id": 0, "attempt": 0, "sides": [{"episode": 0}, {"episode": 1}]}
    waiting = [judgement(pair, annotator=f"annotator {number}") for number in range(20)]
    answered: list[str] = []
    six, twelve = Event(), Event()

    def submit(said: dict[str, Any]) -> None:
        """As the page does: sent until it is answered."""
        end = time.monotonic() + 240
        while time.monotonic() < end:
            try:
                url = f"http://127.0.0.1:{port}/api/judgements"
                answer = httpx.post(url, json=said, headers=headers, trust_env=False, timeout=30)
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            assert answer.json() == {"stored": said["id"]}
            answered.append(said["id"])
            for event, count in ((six, 6), (twelve, 12)):
                if len(answered) >= count:
                    event.set()
            return
        raise AssertionError("never answered")

    process = served(run, port)
    try:
        with ThreadPoolExecutor(3) as annotators:
            results = [annotators.submit(submit, said) for said in waiting]
            for reached in (six, twelve):
                assert reached.wait(120)
                process.kill()
                process.wait()
                told = [*answered]
                assert {*told} <= {row[0] for row in rows(run)}, "answered, and not on disk"
                process = served(run, port)
            for result in results:
                result.result()
    finally:
        process.kill()
        process.wait()
    assert sorted(row[0] for row in rows(run)) == sorted(said["id"] for said in waiting)
