"""Settings of the handover."""

import math

import pytest

from kv_transfer.config import TransferConfig, address_from


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("decode-0.pool:7000", ("decode-0.pool", 7000)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_addresses_are_split(text: str, expected: tuple[str, int]) -> None:
    assert address_from(text) == expected


@pytest.mark.parametrize("text", ["", "host", ":1", "host:", "host:-1", "host:65536", "host:1x"])
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected host:port, got"):
        address_from(text)


@pytest.mark.parametrize(
    "change",
    [
        {"lease_s": 0},
        {"lease_s": math.nan},
        {"slice_bytes": 0},
        {"max_data_connections": -1},
        {"data_address": "nowhere"},
        {"data_plane": "shm"},
        {"checksums": "always"},
        {"tls_cert": "cert.pem", "tls_key": "key.pem"},
        {"max_connections_per_peer": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change) -> None:
    with pytest.raises(ValueError, match="got"):
        TransferConfig(**change)
