"""The rules of style for protos, checked on the descriptors; stubs equal what compiles."""

import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import (
    Descriptor,
    EnumDescriptor,
    FieldDescriptor,
    FileDescriptor,
    MethodDescriptor,
    ServiceDescriptor,
)

from protos import check

FILES = sorted(path.stem for path in (check.ROOT / "protos/isthmus/v1").glob("*.proto"))
UNITS = ("_s", "_ms")  # forbidden on the wire, where durations are uint64 nanoseconds


def descriptor(name: str) -> FileDescriptor:
    module = importlib.import_module(f"protos.isthmus.v1.{name}_pb2")
    file: FileDescriptor = module.DESCRIPTOR
    return file


def messages() -> Iterator[Descriptor]:
    pending = [m for name in FILES for m in descriptor(name).message_types_by_name.values()]
    while pending:
        message = pending.pop()
        pending += message.nested_types
        if not message.GetOptions().map_entry:
            yield message


def enums() -> Iterator[EnumDescriptor]:
    for name in FILES:
        yield from descriptor(name).enum_types_by_name.values()
    for message in messages():
        yield from message.enum_types


def services() -> Iterator[ServiceDescriptor]:
    for name in FILES:
        yield from descriptor(name).services_by_name.values()


def methods() -> Iterator[MethodDescriptor]:
    for service in services():
        yield from service.methods


def fields() -> Iterator[FieldDescriptor]:
    for message in messages():
        yield from message.fields


def upper_snake(camel: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", camel).upper()


def test_the_walk_finds_something() -> None:
    assert len(FILES) >= 6
    assert len(list(messages())) > 30
    assert {service.name for service in services()} >= {"Inference", "PrefillService"}


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_of_the_package(name: str) -> None:
    assert descriptor(name).package == "isthmus.v1"


@pytest.mark.parametrize("enum", list(enums()), ids=lambda enum: enum.name)
def test_enum_values_are_prefixed_and_zero_means_unspecified(enum: EnumDescriptor) -> None:
    prefix = upper_snake(enum.name)
    assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
    assert all(value.name.startswith(f"{prefix}_") for value in enum.values)


def test_request_and_response_belong_to_one_rpc_and_bear_its_name() -> None:
    seen: set[str] = set()
    for method in methods():
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"
        for message in (method.input_type, method.output_type):
            assert message.full_name not in seen
            seen.add(message.full_name)


@pytest.mark.parametrize("message", list(messages()), ids=lambda message: message.name)
def test_names_are_cased_as_everywhere(message: Descriptor) -> None:
    assert re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name)
    for field in message.fields:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name), field.full_name


def test_durations_are_nanoseconds() -> None:
    for field in fields():
        assert not field.name.endswith(UNITS), field.full_name
        if field.name.endswith("_ns"):
            assert field.type == FieldDescriptor.TYPE_UINT64, field.full_name


def test_no_message_is_required_to_hold_python_objects() -> None:
    """Any and Struct would carry what no schema describes."""
    for field in fields():
        if field.message_type is not None:
            package = field.message_type.full_name.rpartition(".")[0]
            assert package.startswith("isthmus.v1"), field.full_name


class TestDrift:
    """`python -m protos.check`; needs grpcio-tools, as `make check` does."""

    @pytest.fixture(autouse=True)
    def _needs_the_compiler(self) -> None:
        pytest.importorskip("grpc_tools")

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """A copy of one proto with its stubs."""
        folder = tmp_path / "protos/isthmus/v1"
        folder.mkdir(parents=True)
        for path in (check.ROOT / "protos/isthmus/v1").glob("sampling*"):
            shutil.copy(path, folder)
        return tmp_path

    def test_the_stubs_are_what_the_protos_compile_to(self) -> None:
        assert check.differing_stubs() == []

    def test_a_changed_proto_is_found(self, root: Path) -> None:
        proto = root / "protos/isthmus/v1/sampling.proto"
        proto.write_text(proto.read_text().replace("bool ignore_eos", "bool ignore_end"))
        assert [line.partition(":")[0] for line in check.differing_stubs(root)] == [
            "protos/isthmus/v1/sampling_pb2.py",
            "protos/isthmus/v1/sampling_pb2.pyi",
        ]

    def test_a_missing_stub_and_one_too_many_are_found(self, root: Path) -> None:
        folder = root / "protos/isthmus/v1"
        (folder / "sampling_pb2.pyi").rename(folder / "old_pb2.pyi")
        assert check.differing_stubs(root) == [
            "protos/isthmus/v1/old_pb2.pyi: no .proto file for this stub",
            "protos/isthmus/v1/sampling_pb2.pyi: missing",
        ]

    def test_a_proto_that_does_not_compile_says_where(self, root: Path) -> None:
        (root / "protos/isthmus/v1/sampling.proto").write_text("nonsense")
        with pytest.raises(ValueError, match=r"sampling\.proto:1:1"):
            check.differing_stubs(root)
