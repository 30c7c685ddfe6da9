"""The one tree of errors that fal_notebook raises on purpose; it survives pickling.

    FalServerlessException                      everything below this root is ours
    ├── AppException                            an app's answer with a status code
    ├── AppClientError                          the same, as the app's caller sees it
    ├── FieldException                          an app's answer about one input field
    ├── RequestCancelledException               the caller went away
    ├── FileTooLargeError
    ├── DownloadError                           a file or repository could not be fetched
    ├── AppFileUploadException
    ├── GPUException                            answered as 503: replace the runner
    │   └── GPUOutOfMemoryException
    │       └── CUDAOutOfMemoryException
    └── FalServerlessError                      a call could not be made or finished
        ├── ConfigurationError                  your settings
        ├── RequirementError                    your requirements (also a ValueError)
        ├── FalSerializationError               a value cannot travel
        ├── FalMissingDependencyError           a module is missing on the host
        ├── UserFunctionException               your code, when its own error cannot be rebuilt here
        ├── EnvironmentBuildError               uv could not build the environment
        ├── ResourceError                       no host can give what the call asks for
        ├── CallTimeoutError                    the call took longer than allowed (also a TimeoutError)
        ├── CallCancelledError                  the call was cancelled, killed, or its lease ended
        ├── WorkerLostError                     the process of your code died
        └── HostError                           the machine
            ├── HostUnreachableError            no connection
            ├── HostKeyError                    the machine's key is unknown or changed
            ├── AuthenticationError             the machine refused the user
            ├── LinkLostError                   an open connection broke
            └── ProtocolError                   the other side sent nonsense

Runs everywhere: in the notebook, in the agent and in workers (user code raises some of these).
"""

from __future__ import annotations

from typing import Any, Optional

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
]


class FalServerlessException(Exception):  # noqa: N818 - the fal SDK's name
    """Root of every error that fal_notebook raises on purpose."""


class AppException(FalServerlessException):
    """An app's answer to one request, with an HTTP status.

    Attributes:
        message: text sent to the caller as `detail`.
        status_code: HTTP status of the answer.
    """

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message, status_code)
        self.message, self.status_code = message, status_code

    def __str__(self) -> str:
        return self.message


class AppClientError(FalServerlessException):
    """An app answered a request with an error, or did not become healthy in time.

    Attributes:
        message: which request, and what was answered.
        status_code: HTTP status of the answer; 504 if there was none.
        headers: headers of the answer, names in lower case.
    """

    def __init__(self, message: str, status_code: int, headers: Optional[dict[str, str]] = None) -> None:
        super().__init__(message, status_code, headers)
        self.message, self.status_code, self.headers = message, status_code, headers or {}

    def __str__(self) -> str:
        return self.message


class FieldException(FalServerlessException):
    """An app's answer that blames one field of the request's body.

    Attributes:
        field: name of the field.
        message: what is wrong with it.
        status_code: HTTP status of the answer.
        type: machine-readable kind of the problem.
        billable_units: accepted for compatibility; nothing is billed here.
    """

    def __init__(
        self,
        field: str,
        message: str,
        status_code: int = 422,
        type: str = "value_error",  # noqa: A002 - the fal SDK's name
        billable_units: int = 0,
    ) -> None:
        super().__init__(field, message, status_code, type, billable_units)
        self.field, self.message, self.status_code = field, message, status_code
        self.type, self.billable_units = type, billable_units

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"

    def to_pydantic_format(self) -> list[dict[str, Any]]:
        """Give the problem in the shape of a validation error's `detail` list."""
        return [{"loc": ["body", self.field], "msg": self.message, "type": self.type}]


class RequestCancelledException(FalServerlessException):
    """The caller of an app went away before the answer was ready."""

    def __init__(self, message: str = "Request cancelled by the client.") -> None:
        super().__init__(message)
        self.message = message


class FileTooLargeError(FalServerlessException):
    """A file is larger than what may travel."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class DownloadError(FalServerlessException):
    """A file or a repository could not be fetched; the message gives the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AppFileUploadException(FalServerlessException):
    """One of `app_files` could not be sent.

    Attributes:
        message: what happened.
        relative_path: the file, relative to the context directory.
    """

    def __init__(self, message: str, relative_path: str) -> None:
        super().__init__(message, relative_path)
        self.message, self.relative_path = message, relative_path

    def __str__(self) -> str:
        return self.message


class GPUException(FalServerlessException):
    """The GPU is in a bad state; the runner is replaced."""

    status_code = 503

    def __init__(self, message: str = "GPU error") -> None:
        super().__init__(message)
        self.message = message


class GPUOutOfMemoryException(GPUException):
    """The GPU has no memory left for this request."""

    def __init__(self, message: str = "GPU error: out of memory") -> None:
        super().__init__(message)


class CUDAOutOfMemoryException(GPUOutOfMemoryException):
    """CUDA has no memory left for this request."""

    def __init__(self, message: str = "CUDA error: out of memory") -> None:
        super().__init__(message)


class FalServerlessError(FalServerlessException):
    """A call could not be made or finished.

    Attributes:
        message: what happened, to which host or name, and what to do next.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the message says it all, and the frames would be ours."""
        notes = [str(note) for note in getattr(self, "__notes__", ())]
        return [f"{type(self).__name__}: {self}", *notes]


class ConfigurationError(FalServerlessError):
    """A setting is wrong: a host that is not known, a settings file that cannot be read."""


class RequirementError(FalServerlessError, ValueError):
    """A requirement line is not one."""


class FalSerializationError(FalServerlessError):
    """A function, argument or result cannot be pickled; the message names the culprit."""


class FalMissingDependencyError(FalServerlessError):
    """The host lacks a module that the function needs; the message names the fix."""


class UserFunctionException(FalServerlessError):  # noqa: N818 - the fal SDK's name
    """Your code raised an error whose class cannot be rebuilt in the notebook."""

    _render_traceback_ = None  # type: ignore[assignment] # its frames are yours: IPython shows them


class EnvironmentBuildError(FalServerlessError):
    """uv could not resolve or build an environment.

    Attributes:
        message: what failed, with what uv wrote about it.
        log: the last 4 KiB of what uv wrote.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.args = (message, log)
        self.log = log

    def __str__(self) -> str:
        return self.message


class ResourceError(FalServerlessError):
    """No host can give what the call asks for."""


class CallTimeoutError(FalServerlessError, TimeoutError):
    """The call took longer than its timeout allows."""


class CallCancelledError(FalServerlessError):
    """The call was cancelled, its worker was killed on request, or its lease ended."""


class WorkerLostError(FalServerlessError):
    """The process that ran your code died before it answered.

    Attributes:
        message: how it died and what to do next.
        exit_status: its exit status, negative for a signal; None when unknown.
    """

    def __init__(self, message: str, exit_status: int | None = None) -> None:
        super().__init__(message)
        self.args = (message, exit_status)
        self.exit_status = exit_status

    def __str__(self) -> str:
        return self.message


class HostError(FalServerlessError):
    """Something is wrong with a machine or with the way to it."""


class HostUnreachableError(HostError):
    """No connection to the machine could be made."""


class HostKeyError(HostError):
    """The machine's host key is unknown, or is not the one that was known."""


class AuthenticationError(HostError):
    """The machine refused the user."""


class LinkLostError(HostError):
    """An open connection to the machine broke."""


class ProtocolError(HostError):
    """The other side of a connection sent what is not a frame or a message."""
