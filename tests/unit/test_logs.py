import json
import logging
import sys
from collections.abc import Iterator

import pytest

from mesh.logs import JsonFormatter, LogFormat, set_up_logging


@pytest.fixture(autouse=True)
def _root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def formatted(message: str, *args: object, **extra: object) -> dict[str, str]:
    record = logging.makeLogRecord(
        {"name": "mesh.x", "levelname": "INFO", "msg": message, "args": args, **extra}
    )
    line = JsonFormatter("decode").format(record)
    assert "\n" not in line
    fields: dict[str, str] = json.loads(line)
    return fields


def test_a_line_is_an_object_with_the_request_id_as_a_field() -> None:
    fields = formatted("aborted request_id=%s blocks=%d", "r-1", 3)
    assert fields["message"] == "aborted request_id=r-1 blocks=3"
    assert (fields["request_id"], fields["blocks"], fields["service"]) == ("r-1", "3", "decode")


def test_the_message_cannot_forge_the_lines_own_fields() -> None:
    fields = formatted("bad input level=critical\nservice=other")
    assert (fields["level"], fields["service"]) == ("info", "decode")


def test_a_traceback_is_a_field() -> None:
    try:
        raise KeyError("secret")
    except KeyError:
        assert "KeyError" in formatted("failed", exc_info=sys.exc_info())["traceback"]


@pytest.mark.parametrize("log_format", LogFormat)
def test_set_up_twice_logs_once(log_format: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        set_up_logging("decode", level="info", log_format=log_format)
    logging.getLogger("mesh.x").info("ready worker_id=%s", "d0")
    logging.getLogger("mesh.x").debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    assert "decode" in line
    assert "ready worker_id=d0" in line


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="'loud'"):
        set_up_logging("decode", level="loud")
