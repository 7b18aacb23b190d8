"""A server under load: its name in the report and where it listens."""

from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import msgspec

from benchmarks.load.process_cpu import CpuMeter, no_meter
from engine.errors import InvalidRequestError


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """An OpenAI-compatible server on plain HTTP."""

    name: str
    host: str
    port: int
    model: str
    meter: CpuMeter = no_meter


async def find_target(text: str, *, meter: CpuMeter = no_meter) -> Target:
    """Ask the server of NAME=URL for its first model.

    Raises:
        InvalidRequestError: the text is not NAME=http://HOST:PORT, or nothing useful answers there.
    """
    name, _, url = text.partition("=")
    parts = urlsplit(url)
    if not name or parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
        raise InvalidRequestError(f"--target must be NAME=http://HOST:PORT, got {text!r}")
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            response = await client.get(f"{url.rstrip('/')}/v1/models", timeout=10)
        models = msgspec.json.decode(response.raise_for_status().content, type=_Models).data
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        raise InvalidRequestError(f"{name}: no list of models at {url}: {error}") from error
    if not models:
        raise InvalidRequestError(f"{name} serves no model at {url}")
    return Target(
        name=name, host=parts.hostname, port=parts.port or 80, model=models[0].id, meter=meter
    )
