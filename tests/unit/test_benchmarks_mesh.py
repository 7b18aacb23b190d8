import os
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.load.mesh import started_mesh
from benchmarks.load.process_cpu import meter_of_state_file, used_between
from engine.errors import NotReadyError

# Stands for `isthmus up`: a state file without addresses first, then a gateway that gets healthy.
FAKE_UP = """
import http.server, json, os, sys
from pathlib import Path

state_file = Path(sys.argv[sys.argv.index("--state-file") + 1])
process = {"name": "gateway", "role": "gateway", "pid": os.getpid(), "num_restarts": 0}

def write(addresses):
    part = state_file.with_suffix(".part")
    part.write_text(json.dumps([process | {"addresses": addresses}]))
    part.replace(state_file)

class Health(http.server.BaseHTTPRequestHandler):
    num_asked = 0

    def do_GET(self):
        Health.num_asked += 1
        self.send_response(200 if Health.num_asked > 1 else 503)
        self.end_headers()

    def log_message(self, *_):
        pass

write({})
server = http.server.HTTPServer(("127.0.0.1", 0), Health)
Path(sys.argv[-1]).write_text(str(os.getpid()))
write({"http": f"127.0.0.1:{server.server_port}"})
server.serve_forever()
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_mesh_is_given_when_it_is_healthy_and_stopped_afterwards(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = (sys.executable, "-c", FAKE_UP)
    async with (
        started_mesh([str(pid_file)], command=command) as mesh,
        httpx.AsyncClient() as http,
    ):
        assert (await http.get(f"{mesh.url}/health")).status_code == 200
        pid = int(pid_file.read_text())
        assert is_running(pid)
        meter = meter_of_state_file(mesh.state_file)
        assert list(used_between(meter(), meter())) == ["gateway"]
    assert meter() == {}
    assert not is_running(pid)


async def test_a_mesh_that_ends_at_once_is_an_error() -> None:
    command = (sys.executable, "-c", "raise SystemExit(3)")
    with pytest.raises(NotReadyError, match="status 3"):
        async with started_mesh([], command=command):
            pytest.fail("was given")
