"""Secrets are found where a user keeps them, and a missing one is told with the way to set it."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import pytest

import fal_notebook as fal
from fal_agent.errors import ConfigurationError
from fal_notebook import secrets

NAME = "FAL_TEST_SECRET"


@pytest.fixture
def keyring(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A keyring in memory, with the two calls that we make of the package."""
    module, errors = types.ModuleType("keyring"), types.ModuleType("keyring.errors")
    errors.KeyringError = type("KeyringError", (Exception,), {})  # type: ignore[attr-defined]
    module.kept = {}  # type: ignore[attr-defined]
    module.asked = []  # type: ignore[attr-defined]
    module.errors = errors  # type: ignore[attr-defined]

    def get_password(service: str, name: str) -> str | None:
        module.asked.append(name)
        if "locked" in module.kept:
            raise errors.KeyringError
        return module.kept.get((service, name))  # type: ignore[no-any-return]

    module.get_password = get_password  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", module)
    monkeypatch.setitem(sys.modules, "keyring.errors", errors)
    monkeypatch.setattr(secrets, "_from_keyring", {})
    return module


def read() -> str:
    return secrets.read_secrets([NAME], what="f()")[NAME]


def test_the_environment_comes_first(keyring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "from the environment")
    keyring.kept["fal_notebook", NAME] = "from the keyring"

    assert read() == "from the environment"
    assert keyring.asked == []


def test_then_the_keyring_which_is_asked_once_in_a_while(keyring: Any) -> None:
    keyring.kept["fal_notebook", NAME] = "from the keyring"

    assert [read(), read()] == ["from the keyring"] * 2
    assert keyring.asked == [NAME]


@pytest.mark.parametrize("kept", [{}, {"locked": True}])
def test_a_missing_one_is_named_with_both_ways_to_set_it(keyring: Any, kept: Any) -> None:
    keyring.kept.update(kept)

    with pytest.raises(ConfigurationError, match=rf"(?s)f\(\) .*{NAME}.*not set.*getpass") as caught:
        read()

    assert f"keyring set fal_notebook {NAME}" in str(caught.value)


def test_an_empty_one_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "")

    with pytest.raises(ConfigurationError, match="not set"):
        read()


@pytest.mark.parametrize("names", ["HF_TOKEN", [3], ["sk-12345-a-value"], ["PATH"], ["LD_PRELOAD"]])
def test_what_is_no_name_is_refused_and_not_repeated(names: Any) -> None:
    with pytest.raises(ValueError, match="secrets") as caught:
        fal.function(secrets=names)

    assert "12345" not in str(caught.value)


def test_a_missing_secret_is_told_before_anything_is_sent() -> None:
    @fal.function(host="local", secrets=["FAL_TEST_NONE"])
    def nothing() -> None: ...

    with pytest.raises(ConfigurationError, match=r"nothing\(\) asks for the secret FAL_TEST_NONE"):
        nothing()


def test_the_values_are_in_no_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "hunter22")

    @fal.function(host="local", secrets=[NAME])
    def nothing() -> None: ...

    parcel = nothing._parcel(nothing.host, (), {})

    assert parcel.call.environ == {NAME: "hunter22"}
    assert "hunter22" not in repr((nothing, nothing.settings, nothing.options, parcel))


def test_on_the_inline_host_the_keyrings_are_there_while_the_call_runs(keyring: Any) -> None:
    keyring.kept["fal_notebook", NAME] = "hunter22"

    @fal.function(host="inline", secrets=[NAME])
    def seen() -> str:
        return os.environ[NAME]

    @fal.function(host="inline", secrets=[NAME])
    def items() -> Any:
        yield os.environ[NAME]

    assert (seen(), list(items())) == ("hunter22", ["hunter22"])
    assert NAME not in os.environ
