"""The settings of an `App` class: their names and defaults, how they are merged, what is refused.

Runs wherever a class is defined, on the standard library alone, and contacts nothing. The most
derived class wins; inside one class the body wins over a class keyword.
"""

from __future__ import annotations

import difflib
import re
import sys
import types
from typing import Any, Optional

__all__ = [
    "DEFAULT_APP_FILES_IGNORE",
    "DEFAULT_HOST_KWARGS",
    "app_name",
    "being_unpickled",
    "check_keywords",
    "merge_settings",
    "refuse_contradictions",
]

DEFAULT_APP_FILES_IGNORE = (r"\.pyc$", r"__pycache__/", r"\.git/", r"\.DS_Store$")

# What `App.host_kwargs` holds: options that have no class variable of their own.
DEFAULT_HOST_KWARGS: dict[str, Any] = {
    "keep_alive": 60,  # seconds that an idle runner lives
    "resolver": "uv",  # or "pip", for compatibility: uv does the work
    "_scheduler": "nomad",  # this one and the next mean something only on fal's own platform
    "_scheduler_options": {"storage_region": "us-east"},
}

# Class variables that are host options when they are set.
_HOST_VARIABLES = (
    *("request_timeout", "startup_timeout", "app_files", "app_files_ignore", "app_files_context_dir"),
    *("min_concurrency", "max_concurrency", "concurrency_buffer", "concurrency_buffer_perc"),
    *("scaling_delay", "max_multiplexing", "kind", "image", "skip_retry_conditions"),
    *("secrets", "termination_grace_period_seconds", "metrics_port", "data_mounts", "retry_config"),
    *("request_start_timeout", "requirements_context_dir"),
)
# Class variables that stay on the class; as keywords they are in `host_kwargs` too.
_CLASS_VARIABLES = (
    *("machine_type", "num_gpus", "regions", "requirements", "local_python_modules", "app_auth"),
)
# Options without a class variable.
_ONLY_KEYWORDS = (
    *("python_version", "compile_bytecode", "force", "force_env_build", "lease", "serializer"),
    *("metadata", "private_logs", "machine_types", "_base_image"),
)
_HOOKS = 8  # at most so many subclass hooks and metaclasses stand between a class and its maker
_LISTS = ("app_files", "app_files_ignore")  # an empty one is as good as none

_VARIABLES = frozenset((*_CLASS_VARIABLES, *_HOST_VARIABLES, *DEFAULT_HOST_KWARGS))
_KEYWORDS = frozenset((*_VARIABLES, *_ONLY_KEYWORDS, "name"))
_MEANT = {  # where spelling misleads
    "timeout": "request_timeout",
    "gpu": "num_gpus",
    "gpus": "num_gpus",
    "app_name": "name",
    "auth": "app_auth",
}


def check_keywords(keywords: dict[str, Any]) -> None:
    """Refuse class keywords that are no settings.

    Raises:
        ValueError: naming the first that is not known, and the nearest that is.
    """
    for name in keywords:
        if name not in _KEYWORDS:
            close = [_MEANT[name]] if name in _MEANT else difflib.get_close_matches(name, _KEYWORDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Unrecognised option {name!r}.{hint}")


def merge_settings(cls: type, keywords: dict[str, Any]) -> dict[str, Any]:
    """Make the `host_kwargs` of a class, and set the class variables that its keywords stand for.

    Args:
        cls: the class, whose parents have theirs already.
        keywords: its class keywords, without `name`.

    Returns:
        A new dictionary; what is unset is absent.
    """
    body = dict(vars(cls))
    given = {name: value for name, value in keywords.items() if value is not None}
    for name, value in given.items():
        if name in _VARIABLES and body.get(name) is None:
            setattr(cls, name, value)
    merged = _inherited(cls)
    for name, value in {**keywords, **body}.items():
        if name in _VARIABLES and value is None:  # takes back what a parent class set
            _unset(merged, name)
    merged.update(body.get("host_kwargs") or {})
    merged.update(given)
    for name in (*DEFAULT_HOST_KWARGS, *_HOST_VARIABLES):
        value = getattr(cls, name, None)
        if value is not None and not (name in _LISTS and not value):
            merged[name] = value
    if merged.get("image") is not None:
        merged["kind"] = "container"
    return merged


def _inherited(cls: type) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for base in reversed(cls.__mro__[1:]):
        merged.update(vars(base).get("host_kwargs") or {})
    return merged


def _unset(merged: dict[str, Any], name: str) -> None:
    merged.pop(name, None)
    if name in DEFAULT_HOST_KWARGS:
        merged[name] = DEFAULT_HOST_KWARGS[name]
    if name == "image":
        merged.pop("kind", None)  # it followed from the image


def being_unpickled() -> bool:
    """Whether the class that is being made is an empty one that cloudpickle fills afterwards.

    Nothing can be checked or computed for such a class: its attributes, the computed ones too, follow.
    """
    frame = sys._getframe(1)  # noqa: SLF001 - the one way to see who makes a class
    for _ in range(_HOOKS):
        maker = frame.f_back
        if maker is None:
            return False
        if frame.f_code is types.new_class.__code__:
            return str(maker.f_globals.get("__name__")).startswith("cloudpickle")
        frame = maker
    return False


def refuse_contradictions(cls: Any) -> None:
    """Refuse settings that exclude each other.

    Raises:
        ValueError: saying which, and what to do instead.
    """
    settings = cls.host_kwargs
    if settings.get("app_files_context_dir") is not None and not settings.get("app_files"):
        raise ValueError(
            f"{cls.__name__}: app_files_context_dir is the base of app_files, and there are none. "
            "Set app_files=[...], or leave app_files_context_dir out."
        )
    if settings.get("kind") == "container" and settings.get("app_files"):
        raise ValueError(
            f"{cls.__name__}: app_files is not supported for container apps. "
            "Copy the files into the image with COPY or ADD in its Dockerfile."
        )


def app_name(cls: type, given: Optional[str]) -> str:
    """Give the name of an app: `app_name` in the class body, else `name=`, else from the class name.

    Raises:
        ValueError: the class name has nothing to make a name of.
    """
    own = vars(cls).get("app_name")
    if own is not None:
        return str(own)
    return given if given is not None else _derived_name(cls.__name__)


def _derived_name(class_name: str) -> str:
    words = re.findall(r"[A-Z][a-z]*", class_name)
    if not words and "_" in class_name:
        words = [word for word in class_name.split("_") if word]
    name = "-".join(word.lower() for word in words) if words else class_name.lower().strip("_")
    if not name:
        raise ValueError(
            f"No app name can be made of the class name {class_name!r}; "
            "give one, as in class MyApp(fal.App, name='my-app')"
        )
    return name
