"""docs/stored_data.md names every column that is stored, with its type, and its queries run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from learner.data import advantage_log
from learner.data.advantage_log import AdvantageLog, read_advantages
from rollout.buffer.segments import SegmentWriter, read_rows
from rollout.wire.schema import SCHEMA, encode
from tests.learner.episodes import group, random_groups

PAGE = (Path(__file__).parents[3] / "docs" / "stored_data.md").read_text(encoding="utf-8")
_COLUMN = re.compile(r"^\| `(\w+)` \| ([\w<>]+) \| .+ \|$", re.MULTILINE)


def _told(heading: str) -> list[tuple[str, str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return _COLUMN.findall(section)


def _stored(schema: pa.Schema) -> list[tuple[str, str]]:
    return [(field.name, re.sub(r"\w+: ", "", str(field.type))) for field in schema]


@pytest.mark.parametrize(
    ("heading", "schema"), [("Rows of turns", SCHEMA), ("Rows of advantages", advantage_log.SCHEMA)]
)
def test_the_page_has_every_column_in_order(heading: str, schema: pa.Schema) -> None:
    assert _told(heading) == _stored(schema)


def test_rows_are_read_by_a_path_or_its_text_and_queried_as_the_page_says(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    played = group(random_groups(3, groups=1)[0], 5)
    writer = SegmentWriter(tmp_path / "groups", max_bytes=1 << 20)
    writer.append(encode(played))
    writer.close()
    advantages_N = [np.full(t.num_sampled, -2.0 + t.index, np.float32) for t in played.trainable]
    AdvantageLog(tmp_path, 0).write(1, [played], advantages_N)

    for read in (read_rows, read_advantages):
        with pytest.raises(FileNotFoundError, match=r"no folder .*absent|absent: no such run folder"):
            read(tmp_path / "absent")

    rows, advantages = read_rows(str(tmp_path / "groups")), read_advantages(str(tmp_path))
    assert rows.equals(read_rows(tmp_path / "groups"))
    files = sorted((tmp_path / "groups").glob("segment-*.arrows"))
    assert rows.equals(pa.concat_tables(pa.ipc.open_stream(file.open("rb")).read_all() for file in files))
    query = re.search(r'duckdb\.sql\("""\n(.+?)"""\)', PAGE, re.DOTALL)
    assert query is not None and advantages.num_rows == rows.num_rows
    ((version, reward, best),) = duckdb.sql(query[1]).fetchall()
    assert (version, best) == (1, -2.0 + len(played.trainable) - 1)
    assert reward == pytest.approx(np.mean(rows["reward"].to_numpy()))
