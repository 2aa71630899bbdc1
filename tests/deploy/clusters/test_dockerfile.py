"""The steps of the image, one after another on this machine without Docker, in a folder that stands for its root."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "deploy" / "kubernetes" / "Dockerfile"
# Docker's own environment of a step; where pip finds packages is this machine's business.
KEPT = ("PATH", "HOME", "LANG", "TMPDIR")


def steps(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction with its arguments, as Docker reads them."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, arguments = line.partition(" ")
        yield name, arguments.strip()


def known_to_apt(arguments: str) -> None:
    """A step of Debian's packages is not run on a machine that is no image: they have to be such that can be had."""
    (install,) = re.findall(r"apt-get install ([^&]*)", arguments)
    packages = [word for word in install.split() if not word.startswith("-")]
    assert packages
    subprocess.run(["apt-get", "install", "--simulate", *packages], check=True, capture_output=True)


class Image:
    """The root of an image, and what its steps have set so far. arguments: in place of the file's own (--build-arg)."""

    def __init__(self, root: Path, arguments: dict[str, str]) -> None:
        self.root, self._arguments = root, arguments
        self.folder, self.variables = root, {name: os.environ[name] for name in KEPT if name in os.environ}

    def step(self, name: str, arguments: str) -> None:
        if name == "ARG":
            key, _, value = arguments.partition("=")
            self.variables[key] = self._arguments.get(key, value)
        elif name == "ENV":
            for each in shlex.split(arguments):
                key, _, value = each.partition("=")
                self.variables[key] = re.sub(r"\$\{(\w+)\}", lambda found: self.variables[found[1]], value)
        elif name == "WORKDIR":
            self.folder = self.root / arguments.lstrip("/")
            self.folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            self._copy(*arguments.split())
        elif name == "RUN" and "apt-get" in arguments:
            known_to_apt(arguments)
        elif name == "RUN":
            self.run(arguments)
        else:
            assert name == "FROM", f"{name} {arguments}"

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["/bin/sh", "-c", command], cwd=self.folder, env=self.variables, capture_output=True, text=True,
            encoding="utf-8",
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def _copy(self, *words: str) -> None:
        *sources, target = words
        for source in map(ROOT.joinpath, sources):
            assert source.exists(), source
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, self.folder / target, ignore=ignored, dirs_exist_ok=True)
            else:
                shutil.copy2(source, self.folder / target)


def test_the_file_is_read_as_docker_reads_it() -> None:
    text = "# a comment\nFROM a\nRUN one \\\n    && two\n\nENV A=b C=d\n"
    assert [*steps(text)] == [("FROM", "a"), ("RUN", "one      && two"), ("ENV", "A=b C=d")]


def test_what_is_copied_is_sent_to_the_build() -> None:
    ignored = FILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {word for name, arguments in steps(FILE.read_text(encoding="utf-8")) if name == "COPY"
              for word in arguments.split()[:-1]}  # fmt: skip
    assert copied == sent and all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.timeout(1200)
def test_the_steps_of_the_image_make_a_manta_that_runs(tmp_path: Path) -> None:
    image = Image(tmp_path, {"VENV": str(tmp_path / "usr"), "HOME_FOLDER": str(tmp_path / "home" / "manta")})
    try:
        for name, arguments in steps(FILE.read_text(encoding="utf-8")):
            image.step(name, arguments)
        assert image.variables["HOME"] == str(tmp_path / "home" / "manta")
        image.folder = tmp_path  # where no source is beside it
        assert "frozen_lake" in image.run(f"{tmp_path}/usr/bin/manta recipes")
        run = image.run(
            f"{tmp_path}/usr/bin/python -c 'import deploy, ray, torch, vllm; print(deploy.__file__)'"
        )
        assert run.splitlines()[-1] == str(tmp_path / "opt" / "manta" / "deploy" / "__init__.py")
    finally:
        shutil.rmtree(tmp_path / "usr", ignore_errors=True)  # gigabytes
