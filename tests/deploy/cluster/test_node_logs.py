"""Logs of a node as the run folder has them: every byte once, whatever the files do meanwhile."""

from __future__ import annotations

from pathlib import Path

from deploy.cluster.node_logs import LogCopy


def test_what_is_new_is_appended_once(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    copy = LogCopy(source, "worker-*-02000000-*.[eo][ru][rt]", target)
    assert copy.copy() == 0 and not target.exists()
    mine, late = source / "worker-a-02000000-1.err", source / "worker-b-02000000-2.out"
    mine.write_bytes(b"one\n")
    (source / "worker-c-03000000-3.err").write_bytes(b"of another job")
    assert copy.copy() == 4
    with mine.open("ab") as log:
        log.write("two é\n".encode()[:-2])  # in the middle of a character
    late.write_bytes(b"late")
    assert copy.copy() == 9
    with mine.open("ab") as log:
        log.write("é\n".encode()[1:])
    assert (copy.copy(), copy.copy()) == (2, 0)
    assert {each.name: each.read_bytes() for each in target.iterdir()} == {
        mine.name: "one\ntwo é\n".encode(),
        late.name: b"late",
    }


def test_a_folder_that_cannot_be_written_loses_no_bytes_for_later(tmp_path: Path) -> None:
    (tmp_path / "worker-a-01000000-1.out").write_bytes(b"kept")
    target = tmp_path / "target"
    target.write_bytes(b"in the way")
    copy = LogCopy(tmp_path, "worker-*", target)
    assert copy.copy() == 0
    target.unlink()
    assert copy.copy() == 4 and (target / "worker-a-01000000-1.out").read_bytes() == b"kept"
