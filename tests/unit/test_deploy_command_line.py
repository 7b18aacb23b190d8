import os
import subprocess
import sys

import pytest

from deploy.answer import Answer, split_line
from deploy.bootstrap.check_python import complaint
from deploy.bootstrap.install_torch import attempts
from deploy.chat import Conversation
from deploy.status import pool_table
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1.registry_pb2 import WORKER_ROLE_DECODE, WorkerLoad, WorkerRecord


def isthmus(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_the_split_line_says_where_the_time_went() -> None:
    answer = Answer(
        usage=pb.Usage(num_prompt_tokens=40, num_completion_tokens=11),
        report=pb.RequestReport(
            prefill_queue_ns=200_000,
            prefill_ns=80_000_000,
            handover_bytes=2_000_000,
            handover_ns=1_000_000,
            data_plane="shm",
            first_decode_step_ns=12_300_000,
            time_to_first_token_ns=100_000_000,
            total_ns=300_000_000,
        ),
    )
    assert split_line(answer) == (
        "queue 0.2 ms | prefill 40 tokens in 80.0 ms | handover 2.00 MB in 1.0 ms (2.00 GB/s, shm)"
        " | first decode step 12.3 ms | 50.0 tokens/s"
    )


def test_the_split_line_says_when_the_best_path_was_left() -> None:
    report = pb.RequestReport(degradations=[pb.Degradation(kind="local_prefill", reason="short")])
    line = split_line(Answer(usage=pb.Usage(num_completion_tokens=1), report=report))
    assert "no handover" in line
    assert line.endswith("local_prefill (short)")


def test_a_conversation_keeps_what_was_answered() -> None:
    conversation = Conversation(system="Be brief.")
    assert conversation.asking("one") == [("system", "Be brief."), ("user", "one")]
    assert conversation.asking("two") == [("system", "Be brief."), ("user", "two")]
    conversation.answered("one", "1")
    assert conversation.asking("two")[1:] == [("user", "one"), ("assistant", "1"), ("user", "two")]


def test_commands_of_the_chat() -> None:
    conversation = Conversation(turns=[("user", "one"), ("assistant", "1")])
    assert conversation.command("/nonsense") is not None
    assert len(conversation.turns) == 2
    assert conversation.command("/reset") == "The conversation starts anew."
    assert conversation.turns == []
    assert conversation.command("/system Be kind.") == "System message set."
    assert conversation.system == "Be kind."
    assert conversation.command("/quit") is None


def test_the_pool_table_has_a_row_for_each_record() -> None:
    record = WorkerRecord(
        worker_id="decode-1",
        role=WORKER_ROLE_DECODE,
        address="127.0.0.1:1",
        model_id="model",
        parallel="tp=2",
        load=WorkerLoad(num_blocks=10, num_free_blocks=4),
        draining=True,
    )
    table = pool_table([record])
    assert table.row_count == 1
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["decode-1", "127.0.0.1:1", "tp=2", "0", "0", "6/10", "draining"]


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    result = isthmus("--help")
    assert result.returncode == 0
    for command in ("up", "demo", "chat", "status", "doctor", "gateway", "prefill-worker", "store"):
        assert command in result.stdout
    probe = "import sys, deploy.cli; print({'torch', 'grpc', 'redis', 'numpy'} & set(sys.modules))"
    loaded = subprocess.check_output([sys.executable, "-c", probe], text=True)
    assert loaded.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("up", "--model", "/nowhere/model"), "/nowhere/model"),
        (("up", "--decode", "0"), "--decode"),
        (("up", "--dtype", "int4"), "int4"),
        (("up", "--kv-dtype", "int4"), "int4"),
        (("up", "--decode-parallel", "tp=two"), "--decode-parallel: tp must be a whole number"),
        (("up", "--prefill-parallel", "xp=2"), "--prefill-parallel: 'xp=2' in 'xp=2' is not"),
        (("gateway", "--no-such-flag", "1"), "--no-such-flag"),
        (("health", "127.0.0.1:1"), "127.0.0.1:1"),
    ],
)
def test_a_wrong_argument_is_told_without_a_traceback(arguments, message) -> None:
    result = isthmus(*arguments)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_a_service_alone_has_a_help_of_its_own() -> None:
    result = isthmus("gateway", "--help")
    assert result.returncode == 0
    assert "--http-port" in result.stdout


def test_a_cpu_machine_gets_a_cpu_torch_first_and_any_torch_last() -> None:
    tried = attempts("2.13.0", "cpu")
    assert tried[0] == ["torch==2.13.0+cpu"]
    assert "--index-url" in tried[1]
    assert tried[-1] == ["torch==2.13.0"]
    assert attempts("2.13.0", "cuda") == [["torch==2.13.0"]]


@pytest.mark.parametrize(
    ("version", "has_ensurepip", "words"),
    [((3, 11), True, ""), ((3, 10), True, "Python 3.11"), ((3, 12), False, "python3-venv")],
)
def test_what_a_fresh_machine_lacks_is_named(version, has_ensurepip, words) -> None:
    text = complaint(version, has_ensurepip=has_ensurepip)
    assert words in text
    assert bool(words) == bool(text)
