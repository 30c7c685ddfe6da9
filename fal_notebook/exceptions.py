"""Every error that fal_notebook raises on purpose, and `catch_gpu_exceptions`.

Runs in the notebook and in workers, where it costs standard-library imports only. The errors are
defined, and their tree is drawn, in `fal_agent.errors`: the same classes on both sides.
"""

from __future__ import annotations

import functools
import inspect
import re
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from fal_agent.errors import (
    AppClientError,
    AppException,
    AppFileUploadException,
    AuthenticationError,
    CallCancelledError,
    CallTimeoutError,
    ConfigurationError,
    CUDAOutOfMemoryException,
    DownloadError,
    EnvironmentBuildError,
    FalMissingDependencyError,
    FalSerializationError,
    FalServerlessError,
    FalServerlessException,
    FieldException,
    FileTooLargeError,
    GPUException,
    GPUOutOfMemoryException,
    HostError,
    HostKeyError,
    HostUnreachableError,
    LinkLostError,
    ProtocolError,
    RequestCancelledException,
    RequirementError,
    ResourceError,
    UserFunctionException,
    WorkerLostError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = [
    "AppClientError",
    "AppException",
    "AppFileUploadException",
    "AuthenticationError",
    "CUDAOutOfMemoryException",
    "CallCancelledError",
    "CallTimeoutError",
    "ConfigurationError",
    "DownloadError",
    "EnvironmentBuildError",
    "FalMissingDependencyError",
    "FalSerializationError",
    "FalServerlessError",
    "FalServerlessException",
    "FieldException",
    "FileTooLargeError",
    "GPUException",
    "GPUOutOfMemoryException",
    "HostError",
    "HostKeyError",
    "HostUnreachableError",
    "LinkLostError",
    "ProtocolError",
    "RequestCancelledException",
    "RequirementError",
    "ResourceError",
    "UserFunctionException",
    "WorkerLostError",
    "catch_gpu_exceptions",
]

_F = TypeVar("_F", bound="Callable[..., Any]")

# What the libraries write: torch and CuPy ("CUDA out of memory", "cudaErrorMemoryAllocation"), torch
# on AMD ("HIP out of memory"), XLA and TensorFlow ("RESOURCE_EXHAUSTED"), and CUDA's own libraries.
_CUDA_MEMORY = re.compile(
    r"CUDA(?: error:)? out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
    r"|CU(?:BLAS|DNN|FFT)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_GPU_MEMORY = re.compile(r"HIP(?: error:)? out of memory|RESOURCE_EXHAUSTED: Out of memory", re.IGNORECASE)
_GPU = re.compile(
    r"\bCUDA error\b|\bcudaError[A-Z]|\bCUDA_ERROR_[A-Z]|\bCU(?:BLAS|DNN|FFT|SOLVER|SPARSE)_STATUS_[A-Z]"
    r"|\b(?:cuDNN|NCCL|NVML|HIP) error\b|\bGPU is lost\b|\buncorrectable ECC error\b",
)


class catch_gpu_exceptions(AbstractContextManager["catch_gpu_exceptions"]):  # noqa: N801 - the fal SDK's name, used as a function
    """Turn what GPU libraries raise into `GPUException` and its subclasses.

    A context manager and a decorator, also of `async def` functions and generators. Other errors
    pass through. The library's own error is the `__cause__`.

    Raises:
        CUDAOutOfMemoryException: CUDA has no memory left.
        GPUOutOfMemoryException: another kind of GPU has no memory left.
        GPUException: the GPU or its driver failed otherwise.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raise the matching error of ours, if it is one of the GPU's."""
        found = _translated(error)
        if found is not None:
            raise found from error

    def __call__(self, function: _F) -> _F:
        """Decorate a function."""
        wrapper: Any
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

        elif inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return (yield from function(*args, **kwargs))

        elif inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    async for item in function(*args, **kwargs):
                        yield item

        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

        wrapped: _F = wrapper
        return wrapped


def _translated(error: BaseException | None) -> GPUException | None:
    # By text, since torch raises a bare RuntimeError for most of them, and must not be imported here.
    if not isinstance(error, (RuntimeError, MemoryError)):
        return None
    text = str(error)
    if _CUDA_MEMORY.search(text):
        return CUDAOutOfMemoryException(text)
    if _GPU_MEMORY.search(text):
        return GPUOutOfMemoryException(text)
    library = type(error).__module__.partition(".")[0]
    if _GPU.search(text) or library in {"cupy_backends", "pynvml"}:
        return GPUException(text)
    return None
