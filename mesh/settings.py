"""Where settings come from: defaults < TOML file < environment < flags; nothing unknown passes.

A section is a frozen dataclass; its fields are the settings. `--some-field` sets `some_field` of
the section that has it, `ISTHMUS_<SECTION>__<FIELD>` and `[section] field` likewise.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import os
import textwrap
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

PREFIX = "ISTHMUS_"
MESH_SECTIONS = frozenset(
    {"gateway", "recovery", "worker", "engine", "transfer", "collectives", "store"}
)
"""Sections of every kind of service: one file or environment may serve them all, so a service
passes over what belongs to another. What belongs to none is an error everywhere."""


class SettingsError(ValueError):
    """A setting is unknown or cannot be read; the text names it and what is allowed."""


def load_settings(
    sections: Mapping[str, type[Any]],
    *,
    file: Path | None = None,
    environment: Mapping[str, str],
    flags: Mapping[str, str],
    other_sections: Collection[str] = (),
) -> dict[str, Any]:
    """Build each section from its sources; later sources win.

    Args:
        sections: by name; dataclasses of str, int, float, bool, Path, StrEnum, Literal,
            tuples of these, or one of them or None; or of a class with a method `parse(text)`.
        file: TOML with a table a section.
        environment: only keys that start with ISTHMUS_ are looked at; all of those must be known.
        flags: by field name; a field name stands in one section only.
        other_sections: names that may turn up in the file and the environment, for others to read.

    Raises:
        SettingsError: an unknown key or a value that cannot be read.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if file is not None:
        _add_file(values, sections, other_sections, file)
    for key, text in environment.items():
        section, separator, field = key.removeprefix(PREFIX).lower().partition("__")
        is_others = bool(separator) and section in other_sections and section not in sections
        if not key.startswith(PREFIX) or is_others:
            continue
        known = _types(sections[section]) if section in sections else {}
        if field not in known:
            raise SettingsError(f"{key}: no such setting; {_nearest_settings(key, sections)}")
        values[section][field] = _parsed(key, text, known[field])
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
        documents = _field_documents(cls)
        for field in dataclasses.fields(cls):
            shown = _help_text(field, documents[field.name])
            group.add_argument(
                f"--{field.name.replace('_', '-')}", dest=field.name, metavar="VALUE",
                default=argparse.SUPPRESS, help=shown.replace("%", "%%"),
            )  # fmt: skip
    flags = vars(parser.parse_args(arguments))
    file = flags.pop("config")
    return load_settings(
        sections,
        file=file,
        environment=environment,
        flags=flags,
        other_sections=MESH_SECTIONS,
    )


def _help_text(field: "dataclasses.Field[Any]", document: str) -> str:
    if field.default is dataclasses.MISSING:
        return document
    default = "none" if field.default in (None, "", ()) else str(field.default)
    return f"{document} (default: {default})".lstrip()


def _field_documents(cls: type[Any]) -> dict[str, str]:
    """The strings that stand under the fields in the source; empty where there is none."""
    documents = {field.name: "" for field in dataclasses.fields(cls)}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except OSError:  # no source beside the bytecode: --help shows the defaults only
        return documents
    body = typing.cast("ast.ClassDef", tree.body[0]).body
    for statement, following in itertools.pairwise(body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                documents[name] = " ".join(text.split())
    return documents


def _add_file(
    values: dict[str, dict[str, Any]],
    sections: Mapping[str, type[Any]],
    other_sections: Collection[str],
    file: Path,
) -> None:
    try:
        document = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the settings file {file}: {error}") from error
    for section, table in document.items():
        if section in other_sections and section not in sections:
            continue
        if section not in sections or not isinstance(table, dict):
            known_sections = ", ".join(f"[{name}]" for name in sections)
            raise SettingsError(f"{file}: no section [{section}]; there are {known_sections}")
        known = _types(sections[section])
        for field, value in table.items():
            if field not in known:
                raise SettingsError(
                    f"{file}: [{section}] has no setting {field!r}; it has {', '.join(known)}"
                )
            name = f"{file}: {section}.{field}"
            values[section][field] = _parsed(
                name, _text_from_toml(name, value, known[field]), known[field]
            )


def _text_from_toml(name: str, value: object, wanted: Any) -> str:  # noqa: ANN401
    """What the environment would say; TOML's own types must fit the setting's."""
    is_tuple = typing.get_origin(wanted) is tuple
    if is_tuple and isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, list | dict):
        raise SettingsError(f"{name}: expected a single value, got {value!r}")
    return str(value)


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


def _nearest_settings(key: str, sections: Mapping[str, type[Any]]) -> str:
    """What the operator may have meant: names like `key`, else the whole section, else all."""
    names = {
        f"{PREFIX}{section.upper()}__{field.upper()}": section
        for section, cls in sections.items()
        for field in _types(cls)
    }
    if near := difflib.get_close_matches(key, names, n=3, cutoff=0.9):
        return f"did you mean {' or '.join(near)}?"
    wanted = key.removeprefix(PREFIX).lower().partition("__")[0]
    known = [name for name, section in names.items() if section == wanted] or list(names)
    return f"known: {', '.join(known)}"


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
        parts = (part.strip() for part in text.split(","))
        return tuple(_converted(part, arguments[0]) for part in parts if part)
    if origin is typing.Literal:
        if text not in arguments:
            raise ValueError(f"it must be one of {', '.join(map(str, arguments))}")
        return text
    if wanted is bool:
        truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in truth:
            raise ValueError("it must be true or false")
        return truth[text.lower()]
    if hasattr(wanted, "parse"):
        return wanted.parse(text)
    if issubclass(wanted, StrEnum):
        if text not in (members := [member.value for member in wanted]):
            raise ValueError(f"it must be one of {', '.join(members)}")
        return wanted(text)
    if wanted is float and math.isnan(float(text)):
        raise ValueError("it must be a number")
    return wanted(text)
