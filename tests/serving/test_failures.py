"""What a caller is told when a handler fails: the table of errors, and that telling cannot fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator

import fal_notebook as fal
from fal_agent.serving.failures import plain
from fal_notebook.exceptions import (
    AppException,
    CUDAOutOfMemoryException,
    FieldException,
    GPUException,
    RequestCancelledException,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.apps import Served

    Serve = Callable[..., Served]

OUT_OF_MEMORY = {"detail": "CUDA error: out of memory"}
GPU_ERROR = {"detail": "GPU error"}
INTERNAL = {"detail": "Internal Server Error"}


class Strange(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Picky(BaseModel):
    value: float
    text: str = ""

    @field_validator("text")
    @classmethod
    def never(cls, text: str) -> str:
        raise ValueError(f"not {text}")


class Failing(fal.App):
    error: BaseException = ValueError("secret")

    @fal.endpoint("/sync")
    def sync(self) -> None:
        raise self.error

    @fal.endpoint("/async")
    async def asynchronous(self) -> None:
        raise self.error

    @fal.endpoint("/picky")
    def picky(self, body: Picky) -> dict[str, Any]:
        return {}

    @fal.endpoint("/broken-off")
    def broken_off(self) -> StreamingResponse:
        def parts() -> Iterator[str]:
            yield "begun"
            raise ValueError("halfway")

        return StreamingResponse(parts())

    @fal.endpoint("/wrong-answer")
    def wrong_answer(self) -> int:
        return "cuda"  # type: ignore[return-value]


@pytest.mark.parametrize("path", ["/sync", "/async"])
@pytest.mark.parametrize(
    ("error", "status", "answer"),
    [
        (AppException("no credit", 402), 402, {"detail": "no credit"}),
        (
            FieldException("prompt", "too long"),
            422,
            {"detail": [{"loc": ["body", "prompt"], "msg": "too long", "type": "value_error"}]},
        ),
        (
            FieldException("image", "unreachable", status_code=400, type="image_load_error"),
            400,
            {"detail": [{"loc": ["body", "image"], "msg": "unreachable", "type": "image_load_error"}]},
        ),
        (RequestCancelledException(), 499, {"detail": "Request cancelled by the client."}),
        (RequestCancelledException("gone"), 499, {"detail": "gone"}),
        (CUDAOutOfMemoryException(), 503, OUT_OF_MEMORY),
        (GPUException("GPU is lost"), 503, {"detail": "GPU is lost"}),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 503, OUT_OF_MEMORY),
        (RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at x.cpp"), 503, OUT_OF_MEMORY),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR"), 503, OUT_OF_MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This"), 503, OUT_OF_MEMORY),
        (RuntimeError("CUDA", "out of memory"), 503, GPU_ERROR),
        (ValueError("CUDA out of memory"), 503, GPU_ERROR),
        *(
            (OSError(f"the {word} failed"), 503, GPU_ERROR)
            for word in ("cuda", "cuDNN", "NVML", "nccl", "cublas", "cuFFT", "cusolver", "cusparse", "Triton")
        ),
        (ValueError("secret"), 500, INTERNAL),
        (KeyError("secret"), 500, INTERNAL),
        (Strange(), 500, INTERNAL),
        (SystemExit(1), 500, INTERNAL),
        (HTTPException(404), 404, {"detail": "Not Found"}),
        (HTTPException(404, "no such picture"), 404, {"detail": "no such picture"}),
        (HTTPException(418, {"a": "\ud800"}), 418, {"detail": {"a": "?"}}),
        (AppException("broken \ud800", 400), 400, {"detail": "broken ?"}),
        (AppException("odd", 1000), 500, {"detail": "odd"}),
    ],
)
def test_the_caller_is_told_by_the_table(
    serve: Serve, path: str, error: BaseException, status: int, answer: object
) -> None:
    client = serve(type("Raising", (Failing,), {"error": error})).client

    told = client.post(path)

    assert (told.status_code, told.json()) == (status, answer)
    assert "x-fal-request-id" in told.headers
    assert client.get("/health").status_code == 200


def test_the_log_gets_the_traceback_of_the_apps_code(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    told = serve(Failing).client.post("/sync", headers={"x-fal-request-id": "r1"})

    log = capfd.readouterr().err
    assert log.startswith("POST /sync failed (request r1):\nTraceback (most recent call last):\n")
    assert log.count("  File ") == 1
    assert "raise self.error" in log
    assert log.endswith("ValueError: secret\n")
    assert "secret" not in told.text


def test_an_unknown_path_is_named(serve: Serve) -> None:
    told = serve(Failing).client.post("/no where?x=1")

    assert (told.status_code, told.json()) == (404, {"detail": "Path /no where not found"})


def test_an_answer_that_fails_halfway_is_broken_off(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    """Else the caller would take it for a whole one."""
    client = serve(Failing).client

    with pytest.raises(httpx.RemoteProtocolError):
        client.post("/broken-off")

    assert "ValueError: halfway" in capfd.readouterr().err
    assert client.get("/health").status_code == 200


def test_data_that_speaks_of_gpus_is_no_gpu_error(serve: Serve) -> None:
    """A 503 has the runner replaced; an answer that does not fit its model is no reason for that."""
    assert serve(Failing).client.post("/wrong-answer").status_code == 500


# ---------------------------------------------------------------- validation


def test_a_body_that_does_not_fit_gets_the_usual_list(serve: Serve) -> None:
    told = serve(Failing).client.post("/picky", json={"value": "x"})

    assert told.status_code == 422
    [problem] = told.json()["detail"]
    assert (problem["loc"], problem["type"], problem["input"]) == (["body", "value"], "float_parsing", "x")


@pytest.mark.parametrize(
    ("content", "kind", "echoed"),
    [
        (b"\xff\xfe\x00raw", "application/octet-stream", "<binary 6 bytes>"),
        (b'{"value": "\\ud800"}', "application/json", "?"),
        (b'{"value": [NaN, Infinity]}', "application/json", ["nan", "inf"]),
        (b'{"value": {"\\udc00": -Infinity}}', "application/json", {"?": "-inf"}),
        (b'{"value": [' + b"9" * 4000 + b"]}", "application/json", ["<whole number of 13288 bits>"]),
    ],
)
def test_whatever_a_body_holds_is_echoed_safely(
    serve: Serve, content: bytes, kind: str, echoed: object
) -> None:
    told = serve(Failing).client.post("/picky", content=content, headers={"content-type": kind})

    assert told.status_code == 422
    assert told.json()["detail"][0]["input"] == echoed


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"value": ' + b"[" * 500 + b"]" * 500 + b"}", b"{", b"\xff"]
)
def test_a_body_that_is_no_json_or_too_deep_is_the_callers_fault(serve: Serve, content: bytes) -> None:
    told = serve(Failing).client.post("/picky", content=content, headers={"content-type": "application/json"})

    assert told.status_code in {400, 422}


def test_an_error_inside_a_problem_becomes_text(serve: Serve) -> None:
    told = serve(Failing).client.post("/picky", json={"value": 1, "text": "x"})

    assert told.json()["detail"][0]["ctx"] == {"error": "not x"}


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.text(st.characters())),
    lambda inner: st.one_of(
        st.lists(inner), st.dictionaries(st.text(st.characters()), inner), st.tuples(inner)
    ),
)


@given(ANYTHING)
def test_anything_becomes_fit_for_json(value: Any) -> None:
    httpx.Request("POST", "http://x", json=plain(value))


def test_a_value_within_itself_is_cut() -> None:
    value: list[Any] = []
    value.append(value)

    httpx.Request("POST", "http://x", json=plain(value))
