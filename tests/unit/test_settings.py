from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import pytest

from mesh.settings import SettingsError, load_settings, parse_command_line


class Plane(StrEnum):
    SHM = "shm"
    TCP = "tcp"


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    num_blocks: int = 16
    """Blocks of the pool;
    100 % of them."""
    fraction: float = 0.9
    is_shared: bool = False
    plane: Plane = Plane.SHM
    mode: Literal["fast", "safe"] = "fast"
    limit_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DoorConfig:
    name: str
    folder: Path = Path("/tmp")
    hosts: tuple[str, ...] = ()
    cores: tuple[int, ...] = (0,)


SECTIONS = {"pool": PoolConfig, "door": DoorConfig}


def load(
    tmp_path: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
    *,
    toml: str = "",
    flags: Mapping[str, str] = MappingProxyType({}),
) -> tuple[PoolConfig, DoorConfig]:
    file = tmp_path / "isthmus.toml"
    file.write_text(toml)
    settings = load_settings(
        SECTIONS,
        file=file,
        environment={"ISTHMUS_DOOR__NAME": "front", "HOME": "/", **environment},
        flags=flags,
        other_sections=["other"],
    )
    return settings["pool"], settings["door"]


def test_defaults_stand_where_nothing_is_said(tmp_path: Path) -> None:
    assert load(tmp_path) == (PoolConfig(), DoorConfig(name="front"))


def test_file_yields_to_environment_yields_to_flags(tmp_path: Path) -> None:
    toml = "[pool]\nnum_blocks = 1\n"
    variable = {"ISTHMUS_POOL__NUM_BLOCKS": "2"}
    assert load(tmp_path, toml=toml)[0].num_blocks == 1
    assert load(tmp_path, toml=toml, environment=variable)[0].num_blocks == 2
    assert (
        load(tmp_path, toml=toml, flags={"num_blocks": "3"}, environment=variable)[0].num_blocks
        == 3
    )


def test_every_type_is_read_from_text(tmp_path: Path) -> None:
    pool, door = load(
        tmp_path,
        flags={
            "fraction": "0.5",
            "is_shared": "true",
            "plane": "tcp",
            "mode": "safe",
            "limit_tokens": "7",
            "folder": "/srv",
            "hosts": "a, b",
            "cores": "1,2",
        },
    )
    assert pool == PoolConfig(
        fraction=0.5, is_shared=True, plane=Plane.TCP, mode="safe", limit_tokens=7
    )
    assert door == DoorConfig(name="front", folder=Path("/srv"), hosts=("a", "b"), cores=(1, 2))


def test_every_type_is_read_from_toml(tmp_path: Path) -> None:
    toml = """
        [pool]
        fraction = 0.5
        is_shared = true
        plane = "tcp"
        limit_tokens = 7
        [door]
        folder = "/srv"
        hosts = ["a", "b"]
        cores = [1, 2]
    """
    pool, door = load(tmp_path, toml=toml)
    assert pool == PoolConfig(fraction=0.5, is_shared=True, plane=Plane.TCP, limit_tokens=7)
    assert door == DoorConfig(name="front", folder=Path("/srv"), hosts=("a", "b"), cores=(1, 2))


def test_an_empty_text_is_none_where_none_is_allowed(tmp_path: Path) -> None:
    assert load(tmp_path, {"ISTHMUS_POOL__LIMIT_TOKENS": ""})[0].limit_tokens is None


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("num_blocks", "two", r"--num-blocks: cannot read 'two'"),
        ("num_blocks", "1.5", r"--num-blocks: cannot read '1.5'"),
        ("num_blocks", "", r"--num-blocks: cannot read ''"),
        ("fraction", "nan", r"--fraction: cannot read 'nan'"),
        ("fraction", "2", r"\[pool\] fraction must be in \(0, 1\], got 2.0"),
        ("is_shared", "maybe", r"--is-shared.*'maybe'.*true or false"),
        ("plane", "pigeon", r"--plane.*'pigeon'.*shm, tcp"),
        ("mode", "slow", r"--mode.*'slow'.*fast, safe"),
        ("cores", "1,x", r"--cores.*'1,x'"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(
    tmp_path: Path, field: str, text: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load(tmp_path, flags={field: text})


def test_a_bad_value_in_the_environment_is_named_by_its_variable(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ISTHMUS_POOL__FRACTION: cannot read 'half'"):
        load(tmp_path, {"ISTHMUS_POOL__FRACTION": "half"})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("ISTHMUS_POOL__NUM_BLOKS", "did you mean ISTHMUS_POOL__NUM_BLOCKS"),
        ("ISTHMUS_DOOR__COLOUR", r"known: ISTHMUS_DOOR__NAME, .*ISTHMUS_DOOR__CORES$"),
        ("ISTHMUS_NOWHERE__X", "no such setting"),
        ("ISTHMUS_POOL", "no such setting"),
        ("ISTHMUS_OTHER", "no such setting"),
    ],
)
def test_an_unknown_variable_is_an_error(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(tmp_path, {key: "1"})


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[pol]\nx = 1", r"no section \[pol\]; there are \[pool\], \[door\]"),
        ("[pool]\nnum_bloks = 1", r"\[pool\] has no setting 'num_bloks'; it has num_blocks"),
        ("num_blocks = 1", r"no section \[num_blocks\]"),
        ("[pool", "cannot read the settings file"),
        ("[pool]\nnum_blocks = [1, 2]", "pool.num_blocks: expected a single value"),
        ('[door]\nname = ["a"]', "door.name: expected a single value"),
        ("[pool]\nnum_blocks = true", "pool.num_blocks: cannot read 'True'"),
    ],
)
def test_an_unknown_or_malformed_entry_of_the_file_is_an_error(
    tmp_path: Path, toml: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load(tmp_path, toml=toml)


def test_sections_of_other_services_are_passed_over(tmp_path: Path) -> None:
    toml = "[other]\nanything = 1\n[pool]\nnum_blocks = 4"
    assert load(tmp_path, {"ISTHMUS_OTHER__ANYTHING": "1"}, toml=toml)[0].num_blocks == 4


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml"):
        load_settings(SECTIONS, file=tmp_path / "nowhere.toml", environment={}, flags={})


def test_a_required_setting_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="missing: --name"):
        load_settings(SECTIONS, file=None, environment={}, flags={})


def test_the_command_line_reads_flags_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "isthmus.toml"
    file.write_text("[pool]\nnum_blocks = 4\nfraction = 0.5")
    arguments = ["--config", str(file), "--num-blocks", "5", "--name", "back"]
    settings = parse_command_line("door", "A door.", SECTIONS, arguments, {})
    assert settings["pool"] == PoolConfig(num_blocks=5, fraction=0.5)
    assert settings["door"].name == "back"


def test_an_unknown_flag_ends_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line("door", "A door.", SECTIONS, ["--colour", "red"], {})
    assert caught.value.code == 2
    assert "--colour" in capsys.readouterr().err


def test_help_shows_what_stands_under_a_field_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        parse_command_line("door", "A door.", SECTIONS, ["--help"], {})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "Blocks of the pool; 100 % of them. (default: 16)" in shown
    assert "ISTHMUS_<SECTION>__<FIELD>" in shown
