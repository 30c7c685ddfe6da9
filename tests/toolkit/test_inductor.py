"""The GPU's name, and caches of torch.compile shared by it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fal_agent.runtime.toolkit import gpu
from fal_notebook.toolkit import (
    get_gpu_type,
    load_inductor_cache,
    sync_inductor_cache,
    synchronized_inductor_cache,
)


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU, until a test adds some."""
    monkeypatch.setattr(gpu, "_DRIVER", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "gpus"


def add(driver: Path, *models: str) -> None:
    for number, model in enumerate(models):
        folder = driver / f"0000:{number:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(
            f"Model: \t\t {model}\nIRQ: 1\nGPU UUID: \t GPU-{number}{number}aa-bb\n"
        )


# ---------------------------------------------------------------- the GPU


def test_without_a_gpu_the_type_is_unknown() -> None:
    assert get_gpu_type() == "UNKNOWN"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA H200", "H200")),
        *(("NVIDIA B200", "B200"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("Tesla T4", "T4")),
        *(
            ("NVIDIA GeForce RTX 4090", "RTX4090"),
            ("NVIDIA RTX A6000", "A6000"),
            ("Tesla V100-SXM2-16GB", "V100"),
        ),
        *(("NVIDIA GH200 480GB", "GH200"), ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX4070TiSUPER")),
        *(
            ("NVIDIA RTX 6000 Ada Generation", "RTX6000Ada"),
            ("NVIDIA TITAN V", "TITANV"),
            ("NVIDIA", "UNKNOWN"),
        ),
    ],
)
def test_a_gpu_is_named_by_its_model(driver: Path, model: str, name: str) -> None:
    add(driver, model)

    assert get_gpu_type() == name


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "H100"),
        ("1", "A100"),
        ("1,0", "A100"),
        ("GPU-11", "A100"),
        ("", "UNKNOWN"),
        ("7", "UNKNOWN"),
        ("-1", "UNKNOWN"),
    ],
)
def test_the_first_gpu_that_is_lent_to_this_process_counts(
    driver: Path, visible: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(driver, "NVIDIA H100", "NVIDIA A100")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert get_gpu_type() == name


# ---------------------------------------------------------------- caches


def local() -> Path:
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def compile_something(name: str = "d/kernel.py", text: str = "code") -> None:
    path = local() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_next_worker_finds_what_the_first_compiled(driver: Path, data: Path) -> None:
    add(driver, "NVIDIA H100")
    with synchronized_inductor_cache("my-model/1"):
        compile_something()
    first = local()

    load_inductor_cache("my-model/1")

    assert local() != first
    assert (local() / "d" / "kernel.py").read_text() == "code"
    assert (data / ".fal" / "inductor-caches" / "H100" / "my-model" / "1.zip").is_file()


def test_another_key_or_gpu_has_another_cache(driver: Path) -> None:
    with synchronized_inductor_cache("one"):
        compile_something()

    load_inductor_cache("two")
    assert list(local().iterdir()) == []
    add(driver, "NVIDIA H100")
    load_inductor_cache("one")
    assert list(local().iterdir()) == []


def test_nothing_new_is_not_shared_again(data: Path) -> None:
    with synchronized_inductor_cache("key"):
        compile_something()
    archive = data / ".fal" / "inductor-caches" / "UNKNOWN" / "key.zip"
    before = archive.stat().st_ino

    with synchronized_inductor_cache("key"):
        pass
    assert archive.stat().st_ino == before

    with synchronized_inductor_cache("key"):
        compile_something("other.py")
    assert archive.stat().st_ino != before


def test_what_a_failed_block_compiled_is_not_shared(data: Path) -> None:
    def fail() -> None:
        with synchronized_inductor_cache("key"):
            compile_something()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()

    assert not (data / ".fal" / "inductor-caches").exists()


def test_the_same_content_has_the_same_digest() -> None:
    empty = load_inductor_cache("key")
    assert load_inductor_cache("other") == empty
    compile_something()
    sync_inductor_cache("key", empty)
    compiled = load_inductor_cache("key")

    assert compiled != empty
    assert load_inductor_cache("key") == compiled


def test_many_can_share_at_once(data: Path) -> None:
    before = load_inductor_cache("key")
    compile_something()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: sync_inductor_cache("key", before), range(8)))

    assert [path.name for path in (data / ".fal" / "inductor-caches" / "UNKNOWN").iterdir()] == ["key.zip"]
    load_inductor_cache("key")
    assert (local() / "d" / "kernel.py").read_text() == "code"


def test_sharing_comes_after_loading() -> None:
    with pytest.raises(RuntimeError, match="load_inductor_cache"):
        sync_inductor_cache("key", "")


@pytest.mark.parametrize("key", ["", "../x", "/etc/x", "a/../../b", "a b", "a\n", ".hidden"])
def test_a_key_stays_in_its_folder(key: str) -> None:
    with pytest.raises(ValueError, match="cache_key"):
        load_inductor_cache(key)
