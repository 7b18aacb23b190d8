import asyncio

import pytest
from grpc import StatusCode

from engine import errors
from engine.errors import CapacityError, InvalidRequestError, IsthmusError, KvLeaseLostError
from mesh.status import MAX_TEXT_CHARS, STATUS_OF, error_from_status, status_of


class TinyPoolError(CapacityError):
    """A subclass, to prove the lookup by MRO."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(
            InvalidRequestError("bad"), (StatusCode.INVALID_ARGUMENT, "bad"), id="invalid"
        ),
        pytest.param(TinyPoolError("full"), (StatusCode.RESOURCE_EXHAUSTED, "full"), id="subclass"),
        pytest.param(KvLeaseLostError("gone"), (StatusCode.ABORTED, "gone"), id="kv-lost"),
        pytest.param(KeyError("secret"), (StatusCode.INTERNAL, "internal error"), id="bug"),
    ],
)
def test_status_of(error: Exception, expected: tuple[StatusCode, str]) -> None:
    assert status_of(error) == expected


def test_every_error_of_the_tree_has_a_code() -> None:
    tree = {
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, IsthmusError) and cls is not IsthmusError
    }
    assert tree == set(STATUS_OF)


async def test_status_of_looks_inside_task_groups() -> None:
    async def fail() -> None:
        raise KvLeaseLostError("gone")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
    assert status_of(caught.value) == (StatusCode.ABORTED, "gone")


def test_a_long_text_is_cut_to_fit_a_header() -> None:
    assert len(status_of(InvalidRequestError("x" * 100_000))[1]) == MAX_TEXT_CHARS


@pytest.mark.parametrize("error_class", STATUS_OF)
def test_a_status_number_becomes_an_error_of_the_same_code(
    error_class: type[IsthmusError],
) -> None:
    code, _ = status_of(error_class("text"))
    back = error_from_status(code.value[0], "text")
    assert status_of(back) == (code, "text")


def test_an_unknown_status_number_is_a_plain_error() -> None:
    assert type(error_from_status(4711, "text")) is IsthmusError
