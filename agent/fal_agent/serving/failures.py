"""What a caller is told when a handler fails, and what the log is told.

Runs in the process that serves an app. A caller never sees a traceback; the log always does. The
handlers here cannot fail themselves, whatever bytes, numbers or broken text an error holds.
"""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from typing import TYPE_CHECKING, Any, Optional

from fastapi.exceptions import RequestValidationError, ResponseValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from fal_agent.errors import AppException, FieldException, GPUException, RequestCancelledException
from fal_agent.runtime.requests import current_request_id

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["FailureMiddleware", "add_failure_handlers", "plain", "report"]

_CLIENT_CLOSED_REQUEST = 499
_DEEPEST = 60  # levels of nesting that are echoed to a caller
_LARGEST = 4096  # bits of a whole number that are echoed to a caller
_CUT = "..."

# What a RuntimeError says when the GPU's memory is full, or when a library hides that it is.
_MEMORY = (
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
)
_GPU = re.compile("cuda|cudnn|nvml|nccl|cublas|cufft|cusolver|cusparse|triton", re.IGNORECASE)
_OURS = (
    "fal_agent.serving",
    "fastapi",
    "starlette",
    "anyio",
    "uvicorn",
    "uvloop",
    "asyncio",
    "concurrent",
    "threading",
)


def add_failure_handlers(application: FastAPI) -> None:
    """Teach an application the answers to errors that are raised on purpose."""
    application.add_exception_handler(RequestValidationError, _invalid)
    application.add_exception_handler(HTTPException, _http)
    application.add_exception_handler(AppException, _app)
    application.add_exception_handler(FieldException, _field)
    application.add_exception_handler(RequestCancelledException, _cancelled)
    application.add_exception_handler(GPUException, _gpu)


class FailureMiddleware:
    """Answers every other error; it stands inside the middleware that adds headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer it if nothing else did."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            return  # nobody is left to be told
        except (Exception, SystemExit) as error:  # noqa: BLE001 - reported and answered
            report(error, f"{scope['method']} {scope['path']}")
            if not has_begun:
                await _answer(*_unexpected(error))(scope, receive, send)
                return
            # Only a broken connection tells the caller that the answer is not whole.
            raise _AnswerBrokenOffError(f"the answer to {scope['path']} broke off") from None


class _AnswerBrokenOffError(Exception):
    """The handler failed after its answer had begun; the failure itself is in the log."""


def report(error: BaseException, what: str) -> None:
    """Write an error's traceback into the log, beginning where the app's own code does.

    Args:
        error: what was raised.
        what: what failed, for the line above the traceback.
    """
    request_id = current_request_id.get()
    label = f" (request {request_id})" if request_id else ""
    lines = traceback.format_exception(type(error), error, _from_user_code(error.__traceback__))
    sys.stderr.write(f"{what} failed{label}:\n{''.join(lines)}")
    sys.stderr.flush()


def plain(value: Any, depth: int = 0) -> Any:
    """Make any value fit for JSON: bytes become `<binary N bytes>`, NaN and infinities strings.

    Surrogates that are not paired become question marks; what is nested too deeply is cut.
    """
    if depth > _DEEPEST:
        return _CUT
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        bits = int(value).bit_length()
        return int(value) if bits <= _LARGEST else f"<whole number of {bits} bits>"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<binary {memoryview(value).nbytes} bytes>"
    if isinstance(value, dict):
        return {_text(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, depth + 1) for item in value]
    return _text(value)


def _text(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception:  # noqa: BLE001 - a user's __str__ may do anything; the type is said instead
        text = f"<{type(value).__name__}>"
    return text.encode("utf-8", "replace").decode("utf-8")


def _answer(status: int, detail: Any, headers: Optional[Mapping[str, str]] = None) -> Response:
    content = json.dumps({"detail": plain(detail)}, ensure_ascii=False, allow_nan=False)
    known = isinstance(status, int) and 200 <= status <= 599  # noqa: PLR2004 - what an HTTP status can be
    return Response(
        content.encode(), status if known else 500, media_type="application/json", headers=headers
    )


def _unexpected(error: BaseException) -> tuple[int, str]:
    """Give status and detail for an error that is no answer by itself."""
    text = _text(error)
    if isinstance(error, RuntimeError) and len(error.args) == 1:
        is_full = "CUDA" in text and "out of memory" in text
        if is_full or any(sign in text for sign in _MEMORY):
            return 503, "CUDA error: out of memory"
    # The text of a response that does not validate is the handler's data, which may well speak of GPUs.
    if _GPU.search(text) and not isinstance(error, ResponseValidationError):
        return 503, "GPU error"
    return 500, "Internal Server Error"


def _invalid(_request: Request, error: Any) -> Response:
    return _answer(422, error.errors())


def _http(request: Request, error: Any) -> Response:
    is_unknown = error.status_code == 404 and "endpoint" not in request.scope  # noqa: PLR2004 - Not Found
    if error.status_code in {204, 304}:
        return Response(status_code=error.status_code, headers=error.headers)
    detail = f"Path {request.scope['path']} not found" if is_unknown else error.detail
    return _answer(error.status_code, detail, error.headers)


def _app(_request: Request, error: Any) -> Response:
    return _answer(error.status_code, error.message)


def _field(_request: Request, error: Any) -> Response:
    return _answer(error.status_code, error.to_pydantic_format())


def _cancelled(_request: Request, error: Any) -> Response:
    return _answer(_CLIENT_CLOSED_REQUEST, error.message)


def _gpu(request: Request, error: Any) -> Response:
    report(error, f"{request.method} {request.scope['path']}")
    return _answer(error.status_code, error.message)


def _from_user_code(trace: Optional[TracebackType]) -> Optional[TracebackType]:
    """Skip the frames that led to the app's code; give them all if there are no others."""
    found = trace
    while found is not None:
        module = str(found.tb_frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in _OURS and not module.startswith("fal_agent.serving."):
            return found
        found = found.tb_next
    return trace
