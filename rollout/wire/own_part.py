"""A user's own part of a run: a recipe names it "module:name" as a `kind`, with its options beside it.

    loss = { kind = "mine:asymmetric", power = 0.5 }   ->   mine.asymmetric(logprobs_N, ..., power=0.5)

One mechanism for all parts that may be a user's own (docs/extending.md lists them): a subclass of `OwnPart` declares
the positional arguments and tries the function on a small example. Reading a recipe imports no module of the user.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import reprlib
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


_MOST_LINES = 3  # of the user's code in a message, the innermost ones
_NOT_OWN = (
    *(str(Path(__file__).parents[2] / package) for package in ("envs", "rollout", "learner", "deploy")),
    *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
    "<",  # frozen modules and compiled text
)
_SHORT = reprlib.Repr()  # an error's own __repr__ may raise, or never end
_SHORT.maxother = 1000  # characters


class OwnPartError(Exception):
    """A user's own part cannot be used. message: one line for its author; details: the traceback, if there is one."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class OwnPartRefused(OwnPartError):
    """A user's own part has a wrong signature or result."""


class OwnPartFailed(OwnPartError):
    """A user's own part raised an error."""


class OwnPart(BaseModel, extra="allow", frozen=True):
    """A function or class of a user's own module. A section that is only a string is its `kind`."""

    CALLED_WITH: ClassVar[tuple[str, ...]] = ()  # positional arguments, before the options

    kind: str = Field(
        description='function or class of your own module, as "module:name"; all other options of the section '
        "are its keyword arguments"
    )

    @model_validator(mode="before")
    @classmethod
    def _named_alone(cls, section: Any) -> Any:
        return {"kind": section} if isinstance(section, str) else section

    @field_validator("kind")
    @classmethod
    def _is_reference(cls, kind: str) -> str:
        if not _REFERENCE.fullmatch(kind):
            raise ValueError(f'{kind!r} names no function; write "module:name"')
        return kind

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the function."""
        return dict(self.__pydantic_extra__ or {})

    def run(self, *given: Any) -> Any:
        """Call the function; the first call imports its module."""
        return pkgutil.resolve_name(self.kind)(*given, **self.keywords)

    def call(self, *given: Any, passed: tuple[type[Exception], ...] = ()) -> Any:
        """`run`, with an error of the user's code as OwnPartFailed: one line, with up to three lines of that code.

        passed: errors that are not the user's and stay what they are.
        """
        return self.guarded(self.run, *given, passed=passed)

    def guarded(
        self, function: Callable[..., Any], *given: Any, passed: tuple[type[Exception], ...] = ()
    ) -> Any:
        """The same for a function of the part, such as a method of the object that it makes."""
        try:
            return function(*given)
        except passed:
            raise
        except Exception as error:  # any error: the code is the user's
            frames = traceback.extract_tb(error.__traceback__)
            own = [each for each in frames if not each.filename.startswith(_NOT_OWN)][-_MOST_LINES:]
            lines = ", ".join(f"{Path(each.filename).name}:{each.lineno} in {each.name}" for each in own)
            message = f"{self.kind} failed: {_SHORT.repr(error)}" + (f" ({lines})" if lines else "")
            raise OwnPartFailed(message, "".join(traceback.format_exception(error))) from error

    def check_signature(self, function: Callable[..., Any]) -> None:
        """Raise OwnPartRefused where the function does not accept these arguments."""
        try:
            inspect.signature(function).bind(*self.CALLED_WITH, **self.keywords)
        except TypeError as error:
            said = ", ".join([*self.CALLED_WITH, *(f"{name}=..." for name in self.keywords)])
            name = self.kind.partition(":")[2]
            raise OwnPartRefused(f"{self.kind} is called as {name}({said}): {error}") from None
        except ValueError:  # compiled code without a signature
            return

    def try_out(self, critic: bool) -> None:
        """Call the function once on a small example where that is cheap. Raises OwnPartRefused for a wrong result.

        critic: whether the run has a critic.
        """


def _which(section: Any) -> str:
    """Tag of a section: a `kind` with a colon names a user's own part."""
    kind = section.get("kind") if isinstance(section, dict) else section
    if isinstance(section, BaseModel):
        kind = getattr(section, "kind", None)
    return (OWN if isinstance(kind, str) and ":" in kind else BUILT_IN).tag


# Annotated[Annotated[BuiltIn, BUILT_IN] | Annotated[Own, OWN], BY_KIND]: a section that is built in or a user's own.
BUILT_IN, OWN, BY_KIND = Tag("<built-in>"), Tag("<own>"), Discriminator(_which)
TAGS = (BUILT_IN.tag, OWN.tag)  # in the locations of pydantic's errors
