"""What travels with a job: its runtime environment, made of a file and of flags, and what it must hold."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.recipe_files import files_of
from deploy.config.trust import executed

# Packages that are installed for the job alone: they may hold any module, which cannot be known here.
INSTALLERS = ("uv", "pip", "conda", "image_uri", "py_executable")
FIELDS = (
    "working_dir", "py_modules", "env_vars", "excludes", "config", "worker_process_setup_hook", "nsight", *INSTALLERS,
)  # fmt: skip
_OWN = ("envs", "rollout", "learner", "deploy")
_REFERENCE = re.compile(r'"([A-Za-z_]\w*)(?:\.\w+)*:[A-Za-z_][\w.-]*"')  # module:name, as JSON has it
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class RuntimeEnv:
    """A job's runtime environment in Ray's form. Paths in it are absolute, or URIs that the cluster can open."""

    content: dict[str, Any] = field(default_factory=dict)

    @property
    def working_dir(self) -> Path | None:
        """The folder that is sent as the job's working directory; None: there is none here."""
        folder = self.content.get("working_dir", "")
        return Path(folder) if folder and not _is_uri(folder) else None

    @property
    def is_elsewhere(self) -> bool:
        """Whether the working directory is a URI."""
        return _is_uri(self.content.get("working_dir", ""))

    @property
    def packages(self) -> list[Path]:
        """Folders of packages and wheels that are sent."""
        return [Path(each) for each in self.content.get("py_modules", ()) if not _is_uri(each)]

    @property
    def installs(self) -> bool:
        """Whether the job gets packages that are not known here."""
        fetched = [self.content.get("working_dir", ""), *self.content.get("py_modules", ())]
        return any(name in self.content for name in INSTALLERS) or any(map(_is_uri, fetched))

    @property
    def command(self) -> list[str]:
        """The `manta` of the job: that of its own interpreter, where the environment has one."""
        own = any(name in self.content for name in ("uv", "pip", "conda", "py_executable"))
        # -P: the working directory may have modules named as Manta's.
        return ["python", "-P", "-m", "deploy.cli"] if own else ["manta"]


def runtime_env(
    file: Path | None,
    working_dir: Path | None,
    py_modules: Sequence[Path],
    env_vars: Sequence[str],
    environment: dict[str, str],
) -> RuntimeEnv:
    """Join a file in YAML or JSON with what the flags add. ConfigError for anything that is wrong with them.

    env_vars: NAME=VALUE, or NAME alone for its value in `environment`. Relative paths are relative to the current
    folder, as for Ray's own commands.
    """
    content = _read(file) if file is not None else {}
    if working_dir is not None:
        if "working_dir" in content:
            raise ConfigError(f"--working-dir and working_dir in {file}: leave one of them away")
        content["working_dir"] = str(working_dir)
    content["py_modules"] = [*content.get("py_modules", ()), *map(str, py_modules)]
    content["env_vars"] = dict(content.get("env_vars", {})) | dict(
        _variable(each, environment) for each in env_vars
    )
    if (folder := content.get("working_dir")) and not _is_uri(folder):
        if not Path(folder).is_dir():
            raise ConfigError(f"--working-dir {folder}: no such folder; check the path")
        content["working_dir"] = str(Path(folder).resolve())
    for path in content["py_modules"]:
        if not (_is_uri(path) or Path(path).is_dir() or path.endswith(".whl")):
            raise ConfigError(
                f"--py-modules {path} is neither the folder of a package nor a wheel; check the path"
            )
    content["py_modules"] = [
        each if _is_uri(each) else str(Path(each).resolve()) for each in content["py_modules"]
    ]
    return RuntimeEnv({name: value for name, value in content.items() if value})


def require_sent(config: RunConfig, sent: RuntimeEnv) -> None:
    """ConfigError for a recipe with modules that are neither installed nor sent."""
    if sent.installs:
        return
    packages = sent.packages
    for module in dict.fromkeys(name for entry in executed(config) for name in _REFERENCE.findall(entry)):
        there = sent.working_dir is not None and _holds(sent.working_dir, module)
        wheel = any(path.name.startswith(f"{module}-") for path in packages)
        if not (there or wheel or module in {path.name for path in packages} or _installed(module)):
            raise ConfigError(
                f"module {module}, which the recipe names, is not sent to the cluster: send its folder with "
                "--working-dir FOLDER, or a package with --py-modules FOLDER"
            )


def recipe_within(recipe: str, sent: RuntimeEnv) -> str:
    """The path of a recipe relative to the working directory that is sent."""
    if not recipe.endswith(".toml"):
        return recipe
    if sent.working_dir is None:
        raise ConfigError(
            f"recipe {recipe} cannot be sent beside working_dir={sent.content['working_dir']!r}, which the cluster "
            "fetches itself: use a recipe that ships with Manta and overrides, or send a folder here"
        )
    for file in files_of(recipe):
        if not file.resolve().is_relative_to(sent.working_dir):
            raise ConfigError(f"recipe {file} is not sent: put it into --working-dir {sent.working_dir}")
    return str(Path(recipe).resolve().relative_to(sent.working_dir))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--runtime-env {file}: {error.strerror}; check the path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--runtime-env {file}: neither YAML nor JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--runtime-env {file}: write fields with their values, such as `working_dir: .`")
    for name in content:
        if name not in FIELDS:
            near = get_close_matches(str(name), FIELDS, 1)
            meant = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(FIELDS)}"
            raise ConfigError(f"--runtime-env {file}: a runtime environment has no field {name!r}{meant}")
    for name, kind, said in (
        ("py_modules", list, "a list of paths"),
        ("env_vars", dict, "names with values"),
    ):
        if not isinstance(content.get(name, kind()), kind):
            raise ConfigError(f"--runtime-env {file}: {name} must be {said}")
    content["env_vars"] = {str(name): str(value) for name, value in content.get("env_vars", {}).items()}
    return content


def _variable(said: str, environment: dict[str, str]) -> tuple[str, str]:
    name, given, value = said.partition("=")
    if not _VARIABLE.fullmatch(name):
        raise ConfigError(f"--env-var {said}: write NAME=VALUE, or NAME for its value here")
    if not given and name not in environment:
        raise ConfigError(f"--env-var {name}: it has no value here; write {name}=VALUE, or set it")
    return name, value if given else environment[name]


def _is_uri(path: str) -> bool:
    return "://" in path


def _holds(folder: Path, module: str) -> bool:
    return (folder / module).is_dir() or (folder / f"{module}.py").is_file()


def _installed(module: str) -> bool:
    """Whether a module is Manta's, Python's or an installed package's, which the cluster's image has to contain."""
    if module in _OWN or module in sys.stdlib_module_names:
        return True
    return any(_holds(Path(sysconfig.get_path(each)), module) for each in ("purelib", "platlib"))


def parents(sent: RuntimeEnv) -> Iterable[Path]:
    """The folders from which modules that are sent can be imported here."""
    return [*([sent.working_dir] if sent.working_dir else []), *(path.parent for path in sent.packages)]
