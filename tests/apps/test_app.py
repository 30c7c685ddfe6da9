"""Declaring apps: names, settings and how they merge, refusals, routes, construction."""

from __future__ import annotations

import asyncio
import pickle
import re
import subprocess
import sys
import types
from typing import Any

import pytest

import fal_notebook as fal
from fal_agent.errors import FalServerlessError
from fal_agent.runtime import app as app_module
from fal_agent.runtime.app import BaseServable
from fal_agent.runtime.routes import HealthCheck, HealthCheckConfig, RouteSignature, mark

DEFAULT_PATTERNS = [r"\.pyc$", r"__pycache__/", r"\.git/", r"\.DS_Store$"]


class Plain(fal.App):
    """An app of this module, so that its instances can be pickled by reference."""

    @fal.endpoint("/")
    def generate(self, prompt: str) -> str:
        return prompt.upper()


# ---------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("requirements", []),
        ("local_python_modules", []),
        ("machine_type", "S"),
        ("num_gpus", None),
        ("regions", None),
        ("app_name", None),
        ("app_auth", None),
        ("app_files", []),
        ("app_files_ignore", DEFAULT_PATTERNS),
        ("app_files_context_dir", None),
        ("request_timeout", None),
        ("startup_timeout", None),
        ("min_concurrency", None),
        ("max_concurrency", None),
        ("concurrency_buffer", None),
        ("concurrency_buffer_perc", None),
        ("scaling_delay", None),
        ("max_multiplexing", None),
        ("kind", None),
        ("image", None),
        ("local_file_path", None),
        ("skip_retry_conditions", None),
        ("isolate_channel", None),
        ("version", "unknown"),
    ],
)
def test_class_variables_have_the_defaults_of_fal(name: str, default: object) -> None:
    assert getattr(fal.App, name) == default


def test_an_app_is_a_servable() -> None:
    assert issubclass(fal.App, BaseServable)


def test_the_host_options_of_app_are_the_four_hidden_ones() -> None:
    assert fal.App.host_kwargs == {
        "keep_alive": 60,
        "resolver": "uv",
        "_scheduler": "nomad",
        "_scheduler_options": {"storage_region": "us-east"},
    }


# ---------------------------------------------------------------- settings


def test_a_keyword_is_a_setting_and_the_name_is_none() -> None:
    class Named(fal.App, name="x", keep_alive=300, max_concurrency=2, machine_type="GPU"):
        pass

    assert Named.app_name == "x"
    assert Named.host_kwargs["keep_alive"] == 300
    assert Named.host_kwargs["max_concurrency"] == 2
    assert "name" not in Named.host_kwargs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("machine_type", ["GPU-H100", "GPU"]),
        ("num_gpus", 2),
        ("regions", ["lab"]),
        ("requirements", ["numpy"]),
        ("local_python_modules", ["helpers"]),
        ("app_auth", "public"),
        ("startup_timeout", 5),
    ],
)
def test_a_keyword_sets_the_class_variable_too(name: str, value: object) -> None:
    """`class TextToImage(fal.App, machine_type="GPU")` is how the reference writes it."""
    cls = types.new_class("Keyword", (fal.App,), {name: value})

    assert getattr(cls, name) == value
    assert cls.host_kwargs[name] == value


def test_the_body_wins_over_a_keyword() -> None:
    class Both(fal.App, keep_alive=5, num_gpus=1):
        keep_alive = 9
        num_gpus = 4

    assert Both.host_kwargs["keep_alive"] == 9
    assert Both.num_gpus == 4


def test_a_keyword_wins_over_what_is_inherited() -> None:
    class Parent(fal.App):
        keep_alive = 9
        max_multiplexing = 3

    class Child(Parent, keep_alive=5, max_multiplexing=7):
        pass

    class Grandchild(Child):
        max_multiplexing = 1

    assert (Child.host_kwargs["keep_alive"], Child.host_kwargs["max_multiplexing"]) == (5, 7)
    assert (Grandchild.host_kwargs["keep_alive"], Grandchild.host_kwargs["max_multiplexing"]) == (5, 1)
    assert Parent.host_kwargs["keep_alive"] == 9


def test_none_in_the_body_takes_back_what_a_parent_set() -> None:
    class Parent(fal.App, keep_alive=5, request_timeout=3):
        image = object()

    class Child(Parent):
        request_timeout = None
        keep_alive = None
        image = None

    assert Child.host_kwargs["keep_alive"] == 60
    assert not {"request_timeout", "image", "kind"} & set(Child.host_kwargs)


def test_host_kwargs_is_never_the_parents_dictionary() -> None:
    class Parent(fal.App):
        pass

    class Child(Parent):
        pass

    Child.host_kwargs["keep_alive"] = 1

    assert Parent.host_kwargs["keep_alive"] == fal.App.host_kwargs["keep_alive"] == 60


SETTINGS: dict[str, Any] = {
    "request_timeout": 1,
    "startup_timeout": 2,
    "app_files": ["a"],
    "app_files_ignore": ["b"],
    "app_files_context_dir": "c",
    "min_concurrency": 0,
    "max_concurrency": 3,
    "concurrency_buffer": 0,
    "concurrency_buffer_perc": 50,
    "scaling_delay": 0,
    "max_multiplexing": 4,
    "kind": "virtualenv",
    "skip_retry_conditions": ["timeout"],
    "secrets": ["TOKEN"],
    "termination_grace_period_seconds": 5,
    "metrics_port": 9090,
    "data_mounts": [],
    "retry_config": {},
    "request_start_timeout": 6,
    "requirements_context_dir": "d",
}


def test_every_setting_of_the_body_is_a_host_option_and_zero_is_set() -> None:
    cls: Any = types.new_class("Set", (fal.App,), exec_body=lambda body: body.update(SETTINGS))

    assert {name: cls.host_kwargs.get(name) for name in SETTINGS} == SETTINGS


def test_what_is_unset_is_absent() -> None:
    class Bare(fal.App):
        requirements = ["numpy"]
        machine_type = "GPU"
        num_gpus = 1
        regions = ["lab"]
        app_auth = "public"
        local_python_modules = ["helpers"]

    assert Bare.host_kwargs == {
        **fal.App.host_kwargs,
        "app_files_ignore": DEFAULT_PATTERNS,
        "health_check_config": None,
    }


def test_an_image_makes_the_kind_container() -> None:
    image = object()

    Boxed: Any = types.new_class("Boxed", (fal.App,), {"image": image})

    assert Boxed.host_kwargs["image"] is image
    assert Boxed.host_kwargs["kind"] == "container"


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("TextToImage", "text-to-image"),
        ("MySDXLApp", "my-s-d-x-l-app"),
        ("GPT4App", "g-p-t-app"),
        ("myApp", "app"),
        ("_private_app", "private-app"),
        ("my__app", "my-app"),
        ("v2model", "v2model"),
    ],
)
def test_the_name_is_made_from_the_class_name(class_name: str, name: str) -> None:
    assert type(class_name, (fal.App,), {}).app_name == name


def test_a_class_name_without_letters_is_refused() -> None:
    with pytest.raises(ValueError, match="No app name can be made of the class name '__'"):
        type("__", (fal.App,), {})

    assert type("__", (fal.App,), {"app_name": "x"}).app_name == "x"


def test_app_name_in_the_body_wins_over_the_keyword() -> None:
    class Named(fal.App, name="keyword"):
        app_name = "body"

    assert Named.app_name == "body"


def test_each_class_has_its_own_name() -> None:
    class Parent(fal.App, name="first"):
        pass

    class Child(Parent):
        pass

    class Other(Parent, name="second"):
        pass

    assert (Parent.app_name, Child.app_name, Other.app_name) == ("first", "child", "second")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("keepalive", "Unrecognised option 'keepalive'. Did you mean 'keep_alive'?"),
        ("reqirements", "Unrecognised option 'reqirements'. Did you mean 'requirements'?"),
        ("timeout", "Unrecognised option 'timeout'. Did you mean 'request_timeout'?"),
        ("zzz", "Unrecognised option 'zzz'."),
    ],
)
def test_an_unknown_keyword_names_its_nearest_relative(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        types.new_class("Wrong", (fal.App,), {name: 1})


def test_overriding_init_is_refused_in_favour_of_setup() -> None:
    with pytest.raises(ValueError, match=r"setup\(\)"):

        class Wrong(fal.App):
            def __init__(self) -> None: ...

    class Mixin:
        def __init__(self) -> None: ...

    with pytest.raises(ValueError, match="__init__"):

        class Mixed(Mixin, fal.App): ...


def test_a_context_folder_without_files_is_refused() -> None:
    with pytest.raises(ValueError, match="app_files_context_dir is the base of app_files"):

        class Wrong(fal.App):
            app_files_context_dir = "here"


def test_files_do_not_go_with_an_image() -> None:
    with pytest.raises(ValueError, match="app_files is not supported for container apps"):

        class Wrong(fal.App):
            app_files = ["data"]
            image = object()


def test_two_health_checks_are_refused_inherited_ones_too() -> None:
    class Parent(fal.App):
        @fal.endpoint("/a", health_check=fal.HealthCheck())
        def a(self) -> None: ...

    with pytest.raises(ValueError, match="Multiple health check endpoints found"):

        class Child(Parent):
            @fal.endpoint("/b", health_check=fal.HealthCheck())
            def b(self) -> None: ...


def test_a_health_check_on_a_websocket_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be websocket endpoints"):

        class Wrong(fal.App):
            @fal.endpoint("/a", is_websocket=True, health_check=fal.HealthCheck())
            async def a(self, websocket: Any) -> None: ...


def test_two_methods_at_one_path_are_refused_by_their_names() -> None:
    with pytest.raises(ValueError, match=r"Wrong\.first\(\) and Wrong\.second\(\).*'/'"):

        class Wrong(fal.App):
            @fal.endpoint("/")
            def first(self) -> None: ...

            @fal.endpoint("/")
            def second(self) -> None: ...


# ---------------------------------------------------------------- routes


class Several(fal.App):
    @fal.endpoint("/z")
    def alpha(self) -> str:
        return "alpha"

    @fal.endpoint("/a")
    def beta(self) -> str:
        return "beta"

    @fal.endpoint("/a", is_websocket=True)
    async def gamma(self, websocket: Any) -> None: ...


def test_endpoints_are_in_the_order_of_method_names_and_routes_of_paths() -> None:
    app = Several(_allow_init=True)

    assert Several.get_endpoints() == ["/z", "/a", "/a"]
    assert [(key.path, key.is_websocket) for key in app.collect_routes()] == [
        ("/a", False),
        ("/a", True),
        ("/z", False),
    ]
    assert app.collect_routes()[RouteSignature("/a")]() == "beta"


def test_mixins_and_parents_bring_routes() -> None:
    class Mixin:
        @fal.endpoint("/mixed")
        def mixed(self) -> None: ...

    class Child(Mixin, Several):
        pass

    assert Child.get_endpoints() == ["/z", "/a", "/a", "/mixed"]


def test_overriding_a_route_removes_it_unless_it_is_marked_anew() -> None:
    class Child(Several):
        def alpha(self) -> str:
            return "none"

        @fal.endpoint("/moved")
        def beta(self) -> str:
            return "moved"

    assert Child.get_endpoints() == ["/moved", "/a"]


def test_a_marked_method_stays_an_ordinary_one() -> None:
    def function(self: Any) -> None: ...

    assert fal.endpoint("/")(function) is function
    assert function.route_signature == RouteSignature("/")  # type: ignore[attr-defined]
    assert Plain(_allow_init=True).generate("x") == "X"


def test_a_function_has_one_route_only() -> None:
    @fal.endpoint("/")
    def function(self: Any) -> None: ...

    with pytest.raises(ValueError, match=r"^Can't set multiple routes for the same function: function$"):
        fal.endpoint("/b")(function)
    with pytest.raises(ValueError, match="Can't set multiple routes"):
        mark(function, RouteSignature("/c"))


@pytest.mark.parametrize("path", ["", "generate", "http://x/", None])
def test_a_path_begins_with_a_slash(path: Any) -> None:
    with pytest.raises(ValueError, match="begins with a slash"):
        fal.endpoint(path)


def test_options_of_endpoint_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        fal.endpoint("/", True)  # type: ignore[misc]


def test_route_signatures_are_hashable_and_have_defaults() -> None:
    assert RouteSignature._fields == (
        *("path", "is_websocket", "health_check", "input_modal", "output_modal", "realtime_mode"),
        *("content_type", "buffering", "session_timeout", "max_batch_size", "emit_timings"),
        *("encode_message", "decode_message"),
    )
    assert RouteSignature("/") == ("/", False, *[None] * 7, 1, False, None, None)
    assert hash(RouteSignature("/", health_check=HealthCheck())) == hash(
        RouteSignature("/", health_check=HealthCheck())
    )


# ---------------------------------------------------------------- health checks


def test_a_health_check_is_a_holder_with_an_identity() -> None:
    check = HealthCheck(timeout_seconds=3)

    assert (check.timeout_seconds, check.failure_threshold) == (3, None)
    assert HealthCheck.timeout_seconds is HealthCheck.call_regularly is None
    assert hash(check) == hash(HealthCheck(timeout_seconds=3))
    assert check != HealthCheck(timeout_seconds=3)
    with pytest.raises(TypeError):
        HealthCheck(1)  # type: ignore[misc]


@pytest.mark.parametrize("name", ["failure_threshold", "start_period_seconds"])
def test_settings_that_have_no_effect_are_noted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    HealthCheck(call_regularly=False, **{name: 3})

    assert f"{name} of a HealthCheck are ignored" in capsys.readouterr().out


def test_no_note_without_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    HealthCheck(call_regularly=False, timeout_seconds=3)
    HealthCheck(call_regularly=True, failure_threshold=3)

    assert capsys.readouterr().out == ""


def test_the_config_is_that_of_the_one_endpoint_with_a_check() -> None:
    class Checked(fal.App):
        @fal.endpoint("/well", health_check=fal.HealthCheck(timeout_seconds=3, call_regularly=False))
        def well(self) -> None: ...

    config = Checked.get_health_check_config()

    assert config == HealthCheckConfig("/well", timeout_seconds=3, call_regularly=False, method="POST")
    assert Checked.host_kwargs["health_check_config"] is config
    assert Several.get_health_check_config() is fal.App.get_health_check_config() is None


# ---------------------------------------------------------------- construction


def test_construction_is_refused_with_the_ways_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IS_ISOLATE_AGENT", raising=False)

    with pytest.raises(NotImplementedError, match=r"Plain\.spawn\(\).*Plain\.run_local\(\)"):
        Plain()
    with pytest.raises(TypeError):
        Plain(True)  # type: ignore[misc]


def test_construction_is_allowed_on_purpose_and_in_a_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loud(fal.App):
        def setup(self) -> None:
            raise AssertionError

    assert vars(Loud(_allow_init=True)) == {}
    monkeypatch.setenv("IS_ISOLATE_AGENT", "1")
    assert vars(Loud()) == {}


def test_instances_pickle_without_their_request() -> None:
    async def during_lifespan() -> Plain:
        app = Plain(_allow_init=True)
        app.model = "loaded"  # type: ignore[attr-defined]
        async with app.lifespan():
            assert app.current_request is not None
            return pickle.loads(pickle.dumps(app))

    again = asyncio.run(during_lifespan())

    assert (again.model, again.current_request) == ("loaded", None)  # type: ignore[attr-defined]


def test_spawning_asks_the_registered_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_launcher", None)
    with pytest.raises(FalServerlessError, match="spawned from a notebook"):
        Plain.spawn()

    app_module.set_launcher(lambda cls: ("spawned", cls))  # the fixture puts the old one back

    assert Plain.spawn() == ("spawned", Plain)


def test_declaring_needs_the_standard_library_alone() -> None:
    """A worker has neither fastapi nor pydantic unless the app asks for them."""
    code = (
        "import sys, fal_notebook as fal\n"
        "class A(fal.App):\n"
        "    @fal.endpoint('/')\n"
        "    def a(self): ...\n"
        "A(_allow_init=True).collect_routes()\n"
        "print({'fastapi', 'pydantic', 'uvicorn', 'starlette', 'httpx', 'msgpack'} & set(sys.modules))"
    )

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert said.stdout.strip() == "set()"


def test_hooks_can_be_overridden_and_have_defaults() -> None:
    app = Plain(_allow_init=True)

    assert app.health() == {"version": "unknown"}
    assert app.handle_exit() is None
    with pytest.raises(NotImplementedError):
        app.provide_hints()
