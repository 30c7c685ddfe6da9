"""The error tree as users see it, and the errors of GPUs."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import re
from typing import TYPE_CHECKING, Any

import pytest

import fal_agent.errors
from fal_notebook import api, exceptions
from fal_notebook.exceptions import (
    CUDAOutOfMemoryException,
    EnvironmentBuildError,
    FalServerlessError,
    FalServerlessException,
    GPUException,
    GPUOutOfMemoryException,
    WorkerLostError,
    catch_gpu_exceptions,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ERRORS = sorted(
    (
        item
        for item in vars(fal_agent.errors).values()
        if isinstance(item, type) and issubclass(item, Exception)
    ),
    key=lambda item: item.__name__,
)


def instance(cls: type[Exception]) -> Exception:
    """Make an error with an argument for each parameter, optional ones too."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return cls("some text")
    values = {"str": "some text", "int": 418, "int | None": -9, "Optional[dict[str, str]]": {"a": "b"}}
    return cls(**{parameter.name: values[parameter.annotation] for parameter in parameters})


# ---------------------------------------------------------------- the tree


@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_survives_pickling_whole(cls: type[Exception]) -> None:
    """It travels from the worker; whatever does not reach the base class's arguments would be lost."""
    error = instance(cls)

    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is cls
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_every_error_is_exported_and_nothing_else() -> None:
    assert sorted(exceptions.__all__) == sorted([*fal_agent.errors.__all__, "catch_gpu_exceptions"])
    assert [cls.__name__ for cls in ERRORS] == sorted(fal_agent.errors.__all__)


def test_the_tree_drawn_is_the_tree_built() -> None:
    """The drawing at the top of the module is what people read."""
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (fal_agent.errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│ ├└─]*)(\w+(?:Exception|Error))\b", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            drawn[match[2]] = path[depth - 1] if depth else "Exception"

    built = {cls.__name__: cls.__bases__[0].__name__ for cls in ERRORS}

    assert drawn == built


@pytest.mark.parametrize(
    ("ours", "standard"),
    [("RequirementError", ValueError), ("CallTimeoutError", TimeoutError)],
)
def test_errors_with_a_standard_meaning_are_caught_as_such(ours: str, standard: type[Exception]) -> None:
    assert issubclass(getattr(exceptions, ours), standard)


def test_details_of_an_error_are_attributes() -> None:
    assert EnvironmentBuildError("failed", "uv said").log == "uv said"
    assert WorkerLostError("died", -9).exit_status == -9


def test_the_names_of_fal_api_are_there() -> None:
    assert api.FalServerlessError is FalServerlessError
    assert issubclass(api.UserFunctionException, FalServerlessException)
    assert issubclass(api.FalSerializationError, FalServerlessException)
    assert issubclass(api.FalMissingDependencyError, FalServerlessException)
    assert api.Options().host == {}
    assert api.FAL_KEEP_ALIVE == 10


@pytest.mark.parametrize("name", api.__all__)
def test_every_name_of_fal_api_can_be_had(name: str) -> None:
    assert getattr(api, name) is not None
    assert name in dir(api)


def test_an_unknown_name_of_fal_api_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        api.nothing  # noqa: B018


# ---------------------------------------------------------------- errors of GPUs

LIBRARY_ERRORS = [
    (
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.79 GiB total)"),
        CUDAOutOfMemoryException,
    ),
    (
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
        CUDAOutOfMemoryException,
    ),
    (MemoryError("cudaErrorMemoryAllocation: out of memory"), CUDAOutOfMemoryException),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        CUDAOutOfMemoryException,
    ),
    (RuntimeError("HIP out of memory. Tried to allocate 2 GiB"), GPUOutOfMemoryException),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), GPUOutOfMemoryException),
    (RuntimeError("CUDA error: device-side assert triggered"), GPUException),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), GPUException),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), GPUException),
]


@pytest.mark.parametrize(("error", "expected"), LIBRARY_ERRORS)
def test_what_gpu_libraries_raise_becomes_one_of_ours(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(GPUException) as caught, catch_gpu_exceptions():
        raise error

    assert type(caught.value) is expected
    assert str(error) in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA error: quoted in an error of another kind"),
        RuntimeError("the barracuda errors out"),
        RuntimeError("dictionary changed size during iteration"),
        MemoryError(),
        KeyboardInterrupt(),
        CUDAOutOfMemoryException("already ours"),
    ],
)
def test_other_errors_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, catch_gpu_exceptions():
        raise error

    assert caught.value is error


def test_one_object_may_guard_several_blocks() -> None:
    guard = catch_gpu_exceptions()

    with guard, guard:
        boom(error=False)
    with pytest.raises(GPUException), guard:
        boom()


def boom(error: bool = True) -> str:
    """Fail as torch does."""
    if error:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return "fine"


def test_it_decorates_functions() -> None:
    decorated = catch_gpu_exceptions()(boom)

    assert decorated(error=False) == "fine"
    assert (decorated.__name__, decorated.__doc__) == ("boom", boom.__doc__)
    with pytest.raises(GPUException):
        decorated()


def test_it_decorates_coroutine_functions() -> None:
    @catch_gpu_exceptions()
    async def run(error: bool) -> str:
        await asyncio.sleep(0)
        return boom(error)

    assert asyncio.run(run(False)) == "fine"
    with pytest.raises(GPUException):
        asyncio.run(run(True))


def test_it_decorates_generators() -> None:
    @catch_gpu_exceptions()
    def run() -> Iterator[Any]:
        yield 1
        boom()

    items = run()

    assert next(items) == 1
    with pytest.raises(GPUException):
        next(items)


def test_it_decorates_asynchronous_generators() -> None:
    @catch_gpu_exceptions()
    async def run() -> AsyncIterator[Any]:
        yield 1
        boom()

    async def collect() -> list[Any]:
        return [item async for item in run()]

    with pytest.raises(GPUException):
        asyncio.run(collect())
