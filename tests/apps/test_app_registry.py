"""The apps of this notebook by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fal_notebook import app_registry
from fal_notebook.exceptions import ConfigurationError

FIRST = SimpleNamespace(url="http://127.0.0.1:1", headers={})
SECOND = SimpleNamespace(url="http://127.0.0.1:2", headers={})


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_registry, "_apps", {})


def test_a_registered_app_is_found_until_it_is_forgotten() -> None:
    app_registry.register("painter", FIRST)
    assert app_registry.find("painter") is FIRST
    assert app_registry.names() == ["painter"]

    app_registry.forget("painter")
    app_registry.forget("painter")

    assert app_registry.names() == []


def test_of_two_apps_with_one_name_the_later_is_found_and_outlives_the_earlier() -> None:
    app_registry.register("painter", FIRST)
    app_registry.register("painter", SECOND)

    app_registry.forget("painter", FIRST)
    assert app_registry.find("painter") is SECOND

    app_registry.forget("painter", SECOND)
    assert app_registry.names() == []


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    app_registry.register("painter", FIRST)
    app_registry.register("composer", SECOND)

    with pytest.raises(
        ConfigurationError, match=r"'paintr'; there are: composer, painter\. Did you mean 'painter'\?"
    ):
        app_registry.find("paintr")
    with pytest.raises(ConfigurationError, match=r"there are: composer, painter\.$"):
        app_registry.find("xyz")


def test_without_any_app_the_error_says_what_to_do() -> None:
    with pytest.raises(
        ConfigurationError, match=r"none was spawned from this notebook\. Spawn one, or give a URL"
    ):
        app_registry.find("painter")


@pytest.mark.parametrize(
    ("application", "path"),
    [
        ("painter", ""),
        ("painter/edit", "/edit"),
        ("me/painter", ""),
        ("me/painter/edit/now", "/edit/now"),
        ("/me/painter/", ""),
    ],
)
def test_an_owner_and_a_path_may_be_written_as_for_the_fal_sdk(application: str, path: str) -> None:
    app_registry.register("painter", FIRST)
    app_registry.register("edit", SECOND)

    assert app_registry.find_endpoint(application) == (FIRST, path)


def test_a_name_with_a_slash_is_found_as_it_is() -> None:
    app_registry.register("me/painter", FIRST)
    app_registry.register("me", SECOND)

    assert app_registry.find_endpoint("me/painter") == (FIRST, "")
    with pytest.raises(ConfigurationError, match="no app is called 'you/them'"):
        app_registry.find_endpoint("you/them")
