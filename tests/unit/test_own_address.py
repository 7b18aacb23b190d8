import pytest

from mesh.own_address import reachable_host


def test_a_named_host_stays() -> None:
    assert reachable_host("worker-3.example", "redis://nowhere.invalid") == "worker-3.example"


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::", ""])
def test_a_wildcard_becomes_the_interface_towards_redis(wildcard) -> None:
    assert reachable_host(wildcard, "redis://127.0.0.1:6379/0") == "127.0.0.1"


def test_with_a_unix_socket_everybody_is_local() -> None:
    assert reachable_host("0.0.0.0", "unix:///run/redis.sock") == "127.0.0.1"
