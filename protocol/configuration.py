"""The configuration of a server's or a site's folder: TOML, checked; every mistake is reported at once."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from consortium.protocol.errors import InputError, Problem, nearest
from consortium.protocol.files import write_private

_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
NAME_PATTERN = r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$"


def host_name(text: str) -> str:
    """A host's name or IP address, as it is.

    Raises:
        ValueError: it is neither.
    """
    if _HOST.fullmatch(text) is None and not is_address(text):
        raise ValueError("a host name or an IP address would be right, such as fl.example.org")
    return text


def is_address(host: str) -> bool:
    """Whether a host is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host  # an address with a zone means something on one machine only


def proxy_url(text: str) -> str:
    """The URL of an HTTP proxy, or "".

    Raises:
        ValueError: it is something else, or holds a password.
    """
    if "@" in text:
        raise ValueError("a URL with a password is refused; use a proxy that knows this machine")
    if text and re.fullmatch(r"(http://)?[A-Za-z0-9.-]+(:[0-9]{1,5})?/?", text) is None:
        raise ValueError("an address such as http://proxy.clinic.example:3128 would be right")
    return text


def _absolute(text: str) -> str:
    if text and not Path(text).is_absolute():
        raise ValueError('an absolute path would be right, or "" for a passphrase')
    return text


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Host = Annotated[str, AfterValidator(host_name)]
Port = Annotated[int, Field(ge=1, le=65535)]
DoorPort = Annotated[int, Field(ge=0, le=65535)]
"""A port to listen on; 0 is any free one."""
Proxy = Annotated[str, AfterValidator(proxy_url)]
KeyFile = Annotated[str, AfterValidator(_absolute)]


class Configuration(BaseModel):
    """What every configuration has: unknown keys and wrong types are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal[1] = 1


Model = TypeVar("Model", bound=Configuration)


def checked(source: str, model: type[Model], document: dict[str, Any]) -> Model:
    """The configuration in a document; `source` names it in errors.

    Raises:
        InputError: every mistake in it.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        problems = [_problem(model, detail) for detail in details]
    count = f"{len(problems)} mistake" + ("s" if len(problems) != 1 else "")
    raise InputError("\n".join([f"{source}: {count}", *(f"  {p}" for p in problems), "Correct that."]))


def read(path: Path, model: type[Model]) -> Model:
    """The configuration in a TOML file.

    Raises:
        InputError: the file cannot be read, is no TOML, or holds mistakes: every one is named.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid TOML: {error}; correct that line") from error
    return checked(str(path), model, {"format": None, **document})


def write(path: Path, configuration: Configuration) -> None:
    """Write a configuration in place of what was there, mode 0600."""
    write_private(path, tomli_w.dumps(configuration.model_dump()).encode())


def _problem(model: type[BaseModel], detail: ErrorDetails) -> Problem:
    key = ".".join(str(part) for part in detail["loc"])
    got = repr(detail["input"])
    got = got if len(got) <= 80 else got[:77] + "..."
    if "@" in got:
        got = "a value with '@'"  # there may be a password in it
    if detail["type"] == "missing":
        return Problem(key, "nothing", "this key is needed")
    if key == "format":
        return Problem(key, "nothing" if got == "None" else got, "format = 1 would be right")
    if detail["type"] == "extra_forbidden":
        known = list(model.model_fields)
        return Problem(key, got, f"no such key{nearest(key, known)} Keys: {', '.join(known)}")
    if detail["type"] == "string_pattern_mismatch":
        return Problem(key, got, "small letters, digits and inner hyphens, at most 63, would be right")
    right = detail["msg"].removeprefix("Value error, ")
    return Problem(key, got, right[0].lower() + right[1:])
