"""One way of logging for every service: a line for each change of state, with its request id."""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from enum import StrEnum


class LogFormat(StrEnum):
    """human for a terminal, json for a log collector."""

    HUMAN = "human"
    JSON = "json"


_WORD = re.compile(r"(?<!\S)([a-z][a-z0-9_]*)=(\S+)")
_OWN_KEYS = frozenset({"time", "level", "service", "logger", "message", "traceback"})


class JsonFormatter(logging.Formatter):
    """One object a line; `key=value` words of the message, as request_id=, are fields too."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": (message := record.getMessage()),
        }
        line |= {key: value for key, value in _WORD.findall(message) if key not in _OWN_KEYS}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(
    service: str, *, level: str = "info", log_format: LogFormat = LogFormat.HUMAN
) -> None:
    """Log to standard error; `service` stands in every line.

    Raises:
        ValueError: the level does not exist.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise ValueError(f"log level must be debug, info, warning or error, got {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    if log_format is LogFormat.JSON:
        handler.setFormatter(JsonFormatter(service))
    else:
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s %(levelname)s {service} %(name)s: %(message)s")
        )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
