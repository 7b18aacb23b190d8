from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import serving


def test_every_benchmark_is_run_with_a_file_of_its_own() -> None:
    found = command.commands(command.parsed(["--out", "here", "--quick"]), [])
    names = ["engine", "kv_precision", "kv_transfer", "parallel", "gateway", "serving"]
    assert list(found) == names
    assert found["engine"][1:] == [
        *("-m", "benchmarks.engine", "--json", str(Path("here", "engine.json")), "--quick")
    ]


def test_a_peer_stands_beside_the_mesh_that_is_started() -> None:
    options = command.parsed(["--only", "serving", "--target", "vllm=http://h:1"])
    (line,) = command.commands(options, ["--decode", "2"]).values()
    assert line[5:] == ["--start", "--target", "vllm=http://h:1", "--", "--decode", "2"]
    split = line.index("--", 5)
    parsed = serving.parsed(line[3:split])
    assert (parsed.target, parsed.start) == (["vllm=http://h:1"], True)


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parsed(["--only", "nothing"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["5", "9:3", "a:b"])
def test_a_bad_token_range_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.parsed(["--token-ids", text])
    assert "--token-ids" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--repeat", "--rate", "--num-requests"])
def test_a_count_of_nothing_is_a_usage_error(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serving.parsed([option, "0"])
    assert option in capsys.readouterr().err


def test_a_target_that_cannot_be_measured_is_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert serving.main(["--target", "nothing"]) == 1
    assert capsys.readouterr().err == (
        "benchmarks.serving: --target must be NAME=http://HOST:PORT, got 'nothing'\n"
    )
