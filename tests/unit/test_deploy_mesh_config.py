import json
import re
import subprocess

import pytest

from deploy.launcher.child_process import Backoff
from deploy.launcher.free_port import check_port
from deploy.launcher.mesh_config import MeshConfig
from deploy.launcher.os_process import describe_exit
from deploy.launcher.ready_file import (
    ProcessState,
    read_ready_file,
    read_state_file,
    write_state_file,
)
from deploy.launcher.redis_server import find_redis_server
from deploy.launcher.run_directory import local_state_files, remove_stale, run_directory
from deploy.up import check_layouts
from engine.parallel.layout import ParallelLayout
from tests.checkpoints import tiny_checkpoint


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_decode", 0, "--decode must be at least 1, got 0"),
        ("num_prefill", -1, "--prefill must be at least 0, got -1"),
        ("http_port", 70000, r"--http-port must be in \[0, 65535\], got 70000"),
        ("http_port", 50051, "--http-port and --grpc-port are both 50051"),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(field, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        MeshConfig(model="m", **{field: value})


def test_workers_are_numbered_within_their_role() -> None:
    config = MeshConfig(model="m", num_prefill=2, num_decode=1)
    assert config.worker_names == ["prefill-0", "prefill-1", "decode-0"]


def test_backoff_doubles_up_to_its_bound() -> None:
    backoff = Backoff(first_s=1.0, longest_s=5.0)
    assert [backoff.after(n) for n in (1, 2, 3, 4, 10_000)] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_exit_codes_are_told_in_words() -> None:
    assert describe_exit(2) == "exited with status 2"
    assert describe_exit(-11) == "was killed by SIGSEGV"


def test_a_port_in_use_is_named_with_its_flag() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--http-port {port} cannot be used"):
            check_port("127.0.0.1", port, flag="--http-port")
    check_port("127.0.0.1", 0, flag="--http-port")


def test_the_state_file_reads_back_and_leaves_no_other_file(tmp_path) -> None:
    states = [
        ProcessState(
            name="decode-0", role="decode", pid=7, addresses={"grpc": "h:1"}, num_restarts=2
        )
    ]
    path = tmp_path / "new" / "state.json"
    write_state_file(path, states)
    write_state_file(path, states)
    assert read_state_file(path) == states
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]
    assert json.loads(path.read_text())[0]["role"] == "decode"


def test_a_file_of_something_else_is_no_state_file(tmp_path) -> None:
    path = tmp_path / "state.json"
    path.write_text('{"role": 3}')
    with pytest.raises(ValueError, match="is not a state file"):
        read_state_file(path)


def test_no_ready_file_means_not_ready(tmp_path) -> None:
    assert read_ready_file(tmp_path / "none.json") is None


def test_the_run_directory_is_private_and_goes_away(tmp_path) -> None:
    with run_directory(tmp_path) as path:
        assert path.stat().st_mode & 0o777 == 0o700
        remove_stale(tmp_path)
        assert path.is_dir(), "a directory in use is not stale"
    assert list(tmp_path.iterdir()) == []


def test_only_meshes_that_are_up_have_a_local_state_file(tmp_path) -> None:
    stale = tmp_path / "isthmus-run-stale"
    stale.mkdir()
    (stale / "launcher.lock").touch()
    (stale / "state.json").write_text("[]")
    assert local_state_files(tmp_path) == []
    with run_directory(tmp_path) as path:
        (path / "state.json").write_text("[]")
        assert local_state_files(tmp_path) == [path / "state.json"]


def test_a_killed_launchers_directory_is_removed_by_the_next(tmp_path) -> None:
    stale = tmp_path / "isthmus-run-stale"
    stale.mkdir()
    (stale / "launcher.lock").touch()
    foreign = tmp_path / "isthmus-run-without-lock"
    foreign.mkdir()
    with run_directory(tmp_path):
        assert not stale.exists()
        assert foreign.exists(), "not ours: it never had a lock"


def test_a_redis_server_on_the_path_comes_first(tmp_path, monkeypatch) -> None:
    binary = tmp_path / "redis-server"
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == binary


def test_without_one_on_the_path_a_wheel_carries_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    binary = find_redis_server()
    assert binary is not None
    assert "site-packages" in binary.parts
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    assert re.match(r"(Redis|Valkey) server v=", version.stdout)


def test_a_layout_that_the_model_does_not_allow_is_refused_with_its_flag(tmp_path) -> None:
    path = tiny_checkpoint(tmp_path, num_attention_heads=4, num_hidden_layers=3)
    check_layouts(MeshConfig(model=str(path), decode_parallel=ParallelLayout(tp=4, pp=3)))
    config = MeshConfig(model=str(path), decode_parallel=ParallelLayout(tp=5))
    with pytest.raises(ValueError, match=r"--decode-parallel: .*4 query heads.*use tp=4"):
        check_layouts(config)


def test_more_ranks_than_a_host_can_share_its_cores_among_are_refused() -> None:
    with pytest.raises(ValueError, match="are 66 processes; one host runs at most 64"):
        MeshConfig(model="m", num_prefill=1, prefill_parallel=ParallelLayout(tp=65))
