"""Faults, really injected, and what they cost. Bounded: about an hour and a half for everything.

    python -m tests.faults [resumes] [real] [elastic] [matrix] [damage] [ledger] [soak] [--rounds N] [--kills N]
                           [--out FILE]

matrix    every part x signal x moment on several raylets, --rounds times each
resumes   --kills times kill -9 of the whole job at lag 0, each followed by a resume
real      the worker killed, its engine killed and frozen, everything killed, with the real vLLM
elastic   2 -> 4 -> 1 workers by `manta scale` while the run goes on
ledger    --kills times the node of the ledger lost, with its disk, on two nodes of 8 pretended GPUs
damage    every file of a killed run damaged, one at a time, and the run resumed; --only names files
soak      --minutes at full rate: what each part holds in memory and open files; only when it is named

The exit status is 1 when anything was lost, trained twice, or not recovered.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.report.console import errors, output, write
from tests.faults import damage, elastic, ledger, matrix, real, resumes, soak

NAMES = ("resumes", "real", "elastic", "matrix", "damage", "ledger")
LONG = ("soak",)


def say(text: str) -> None:
    write(errors(), text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of: {', '.join(NAMES + LONG)}; none: all but the last"
    )
    parser.add_argument("--rounds", type=int, default=3, help="injections of each kind")
    parser.add_argument(
        "--kills", type=int, default=20, help="kills of the whole job, losses of the ledger's node"
    )
    parser.add_argument("--minutes", type=float, default=120, help="of the soak")
    parser.add_argument("--only", default="", help="kinds of the matrix, or files, whose name contains this")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--out", type=Path, help="write everything to this file, as JSON")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - set(NAMES + LONG)):
        parser.error(f"no faults named {unknown[0]!r}; there are: {', '.join(NAMES + LONG)}")
    report: dict[str, Any] = {}
    sound = True
    with tempfile.TemporaryDirectory(prefix="manta-faults-") as temporary:
        folder = asked.folder or Path(temporary)
        if "resumes" in (asked.names or NAMES):
            result = resumes.run(folder / "resumes", asked.kills, say=say)
            report["resumes"] = asdict(result)
            write(output(), str(result))
            sound &= result.sound
        if "real" in (asked.names or NAMES):
            vllm = real.run(folder / "real", say=say)
            report["real"] = asdict(vllm)
            write(output(), str(vllm))
            sound &= vllm.sound
        if "elastic" in (asked.names or NAMES):
            grown = elastic.run(folder / "elastic", say=say)
            report["elastic"] = asdict(grown)
            write(output(), str(grown))
            sound &= grown.sound
        if "matrix" in (asked.names or NAMES):
            kinds = [kind for kind in matrix.KINDS if asked.only in kind.name] * asked.rounds
            outcomes, books, status = matrix.run(folder / "matrix", kinds, say)
            rows = [
                {"kind": o.kind.name, "seconds": o.seconds, "tokens_again": o.tokens_again, "error": o.error}
                for o in outcomes
            ]
            report["matrix"] = {"outcomes": rows, "accounts": asdict(books), "status": status}
            write(output(), "\n".join(matrix.table(outcomes)))
            write(output(), f"{books} exit status of the run: {status}")
            sound &= not status and not any(outcome.error for outcome in outcomes) and books.sound
        if "damage" in (asked.names or NAMES):
            damaged = damage.run(folder / "damage", say, asked.only)
            report["damage"] = asdict(damaged)
            write(output(), str(damaged))
            sound &= damaged.sound
        if "ledger" in (asked.names or NAMES):
            recovered = ledger.run(folder / "ledger" / "run", asked.kills, say=say)
            report["ledger"] = asdict(recovered)
            write(output(), str(recovered))
            sound &= recovered.sound
        if "soak" in asked.names:
            soaked = soak.run(folder / "soak", asked.minutes, say=say)
            report["soak"] = asdict(soaked)
            write(output(), str(soaked))
            sound &= soaked.sound
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
