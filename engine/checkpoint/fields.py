"""Reads the fields of a JSON object or of GGUF metadata with their types checked."""

import json
from collections.abc import Mapping
from pathlib import Path

from engine.errors import CheckpointError

_MAX_SIZE = 1 << 24
_MAX_NUMBER = 1e30


class Fields:
    """A JSON object whose fields are read with their type checked; errors name file and field."""

    def __init__(self, source: str, values: Mapping[str, object]) -> None:
        self.source = source
        self.values = values

    def with_defaults(
        self, defaults: Mapping[str, object], aliases: Mapping[str, str] | None = None
    ) -> "Fields":
        """The same where `defaults` stand for fields that are not there at all.

        `aliases` leads from names that some files use to the names that are read.
        """
        names = aliases or {}
        own = {names.get(name, name): value for name, value in self.values.items()}
        return Fields(self.source, {**defaults, **own})

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.optional_integer(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.source} has no {name}")
        return default

    def size(self, name: str, default: int | None = None, *, limit: int = _MAX_SIZE) -> int:
        """An integer that sizes something: in [1, limit]."""
        value = self.integer(name, default)
        if not 1 <= value <= limit:
            raise CheckpointError(f"{self.source}: {name} must be in [1, {limit}], got {value}")
        return value

    def optional_integer(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.source}: {name} must be an integer, got {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.optional_number(name)
        return default if value is None else value

    def optional_number(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.source}: {name} must be a number, got {value!r}")
        if not abs(value) < _MAX_NUMBER:  # NaN too, which Python's JSON lets in
            raise CheckpointError(f"{self.source}: {name} must be finite, got {value!r}")
        return float(value)

    def positive(self, name: str, default: float) -> float:
        """A number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise CheckpointError(f"{self.source}: {name} must be positive, got {value}")
        return value

    def only(self, name: str, value: object) -> None:
        """Refuse a field that says something else than `value`; it may be absent."""
        if self.values.get(name, value) not in (None, value):
            raise CheckpointError(
                f"{self.source}: {name} {self.values[name]!r} is not supported ({value!r})"
            )

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.source}: {name} must be true or false, got {value!r}")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(
            isinstance(item, int | float) and abs(item) < _MAX_NUMBER for item in value
        ):
            raise CheckpointError(f"{self.source}: {name} must be a list of finite numbers")
        return tuple(float(item) for item in value)

    def integers(self, name: str) -> frozenset[int]:
        """The integers of a list; none where there is no list."""
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) for item in value
        ):
            raise CheckpointError(f"{self.source}: {name} must be a list of integers")
        return frozenset(value)

    def token_ids(self, name: str) -> frozenset[int]:
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise CheckpointError(f"{self.source}: {name} must be token ids, got {value!r}")
        return frozenset(ids)


def read_json(path: Path) -> Fields:
    """Read one JSON object.

    Raises:
        CheckpointError: the file is missing, not JSON or not an object.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is this a model directory?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return Fields(str(path), values)
