"""Where settings come from: defaults < TOML file < environment < flags; nothing unknown passes.

A section is a frozen dataclass; its fields are the settings. `--some-field` sets `some_field` of
the section that has it, `ISTHMUS_<SECTION>__<FIELD>` and `[section] field` likewise.
"""

import argparse
import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

PREFIX = "ISTHMUS_"


class SettingsError(ValueError):
    """A setting is unknown or cannot be read; the text names it and what is allowed."""


def load_settings(
    sections: Mapping[str, type[Any]],
    *,
    file: Path | None = None,
    environment: Mapping[str, str],
    flags: Mapping[str, str],
) -> dict[str, Any]:
    """Build each section from its sources; later sources win.

    Args:
        sections: by name; dataclasses of str, int, float, bool, Path, StrEnum, Literal,
            tuples of these, or one of them or None.
        file: TOML with a table a section.
        environment: only keys that start with ISTHMUS_ are looked at; all of those must be known.
        flags: by field name; a field name stands in one section only.

    Raises:
        SettingsError: an unknown key or a value that cannot be read.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if file is not None:
        _add_file(values, sections, file)
    for key, text in environment.items():
        if key.startswith(PREFIX):
            section, _, field = key.removeprefix(PREFIX).lower().partition("__")
            values_of = values.get(section)
            known = _types(sections[section]) if section in sections else {}
            if values_of is None or field not in known:
                raise SettingsError(f"{key}: no such setting; {_known_settings(sections)}")
            values_of[field] = _parsed(key, text, known[field])
    for field, text in flags.items():
        section = next(name for name in sections if field in _types(sections[name]))
        flag = f"--{field.replace('_', '-')}"
        values[section][field] = _parsed(flag, text, _types(sections[section])[field])
    return {name: _built(name, cls, values[name]) for name, cls in sections.items()}


def parse_command_line(
    program: str,
    description: str,
    sections: Mapping[str, type[Any]],
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Read the flags of a service's `__main__`; `--help` lists every setting with its default.

    Raises:
        SettingsError: as `load_settings`. Unknown flags end the process with usage, status 2.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, allow_abbrev=False,
        epilog="Each setting can also stand in the TOML file or the environment: "
        f"{PREFIX}<SECTION>__<FIELD>.",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="TOML", help="settings file")
    for name, cls in sections.items():
        group = parser.add_argument_group(name)
        for field in dataclasses.fields(cls):
            shown = "" if field.default is dataclasses.MISSING else f"default: {field.default}"
            group.add_argument(
                f"--{field.name.replace('_', '-')}", dest=field.name, metavar="VALUE",
                default=argparse.SUPPRESS, help=shown.replace("%", "%%"),
            )  # fmt: skip
    flags = vars(parser.parse_args(arguments))
    file = flags.pop("config")
    return load_settings(sections, file=file, environment=environment, flags=flags)


def _add_file(
    values: dict[str, dict[str, Any]], sections: Mapping[str, type[Any]], file: Path
) -> None:
    try:
        document = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the settings file {file}: {error}") from error
    for section, table in document.items():
        if section not in sections or not isinstance(table, dict):
            raise SettingsError(f"{file}: no section [{section}]; {_known_settings(sections)}")
        known = _types(sections[section])
        for field, value in table.items():
            if field not in known:
                raise SettingsError(
                    f"{file}: [{section}] has no setting {field!r}; it has {', '.join(known)}"
                )
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            values[section][field] = _parsed(f"{file}: {section}.{field}", text, known[field])


def _types(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _built(name: str, cls: type[Any], values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        flags = ", ".join(f"--{field.replace('_', '-')}" for field in missing)
        raise SettingsError(f"missing: {flags}")
    try:
        return cls(**values)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"[{name}] {error}") from error


def _known_settings(sections: Mapping[str, type[Any]]) -> str:
    names = (f"{PREFIX}{name.upper()}__{field.upper()}" for name in sections
             for field in _types(sections[name]))  # fmt: skip
    return "known: " + ", ".join(names)


def _parsed(name: str, text: str, wanted: Any) -> Any:  # noqa: ANN401
    """The value that `text` stands for, of the type `wanted`."""
    try:
        return _converted(text.strip(), wanted)
    except ValueError as error:
        raise SettingsError(f"{name}: cannot read {text!r}: {error}") from error


def _converted(text: str, wanted: Any) -> Any:  # noqa: ANN401
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in {types.UnionType, typing.Union}:
        if not text and type(None) in arguments:
            return None
        return _converted(text, next(kind for kind in arguments if kind is not type(None)))
    if origin is tuple:
        return tuple(_converted(part.strip(), arguments[0]) for part in text.split(",") if part)
    if origin is typing.Literal:
        if text not in arguments:
            raise ValueError(f"it must be one of {', '.join(map(str, arguments))}")
        return text
    if wanted is bool:
        truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in truth:
            raise ValueError("it must be true or false")
        return truth[text.lower()]
    if issubclass(wanted, StrEnum):
        if text not in (members := [member.value for member in wanted]):
            raise ValueError(f"it must be one of {', '.join(members)}")
        return wanted(text)
    return wanted(text)
