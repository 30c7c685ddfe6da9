"""Options of `fal.function`: defaults, refusals and their exact texts, merging, the three views."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from fal_agent.errors import FalServerlessError
from fal_agent.framing import FrameDecoder
from fal_agent.runtime.routes import HealthCheckConfig
from fal_agent.wire import Call, EnvironmentSpec, Resources, Scaling, Submit, decode, encode
from fal_notebook import options as options_module
from fal_notebook.options import DEFAULT_APP_FILES_IGNORE, FunctionOptions, make_options

GOOD_VALUES: dict[str, Any] = {
    "host": "gpu-box",
    "kind": "virtualenv",
    "requirements": ["numpy"],
    "python_version": "3.11",
    "compile_bytecode": True,
    "force": True,
    "resolver": "pip",
    "local_python_modules": ["helpers"],
    "image": object(),
    "env_dict": {"name": "x"},
    "env_yml": "environment.yml",
    "env_yml_str": "name: x",
    "packages": ["numpy"],
    "pip": ["numpy"],
    "channels": ["conda-forge"],
    "machine_type": ["GPU-H100", "GPU"],
    "num_gpus": 2,
    "regions": ["lab"],
    "keep_alive": 5,
    "min_concurrency": 1,
    "max_concurrency": 2,
    "concurrency_buffer": 1,
    "concurrency_buffer_perc": 50,
    "scaling_delay": 1.5,
    "max_multiplexing": 4,
    "setup_function": dict,
    "request_timeout": 60,
    "startup_timeout": 30,
    "lease": 0,
    "serializer": "dill",
    "secrets": ["HF_TOKEN"],
    "app_files": ["data"],
    "app_files_ignore": [r"\.tmp$"],
    "app_files_context_dir": "project",
    "serve": True,
    "exposed_port": 8080,
    "health_check_config": HealthCheckConfig("/health", method="GET"),
    "skip_retry_conditions": ["timeout"],
    "metadata": {"openapi": {}},
    "private_logs": True,
    "machine_types": ["S"],
    "_base_image": "x",
    "_scheduler": "nomad",
    "_scheduler_options": {"storage_region": "us-east"},
}
OPTION_NAMES = {item.name for item in dataclasses.fields(FunctionOptions)} - {"given", "has_served"}


class SomeHost:
    """The part of a host that options look at."""

    name = "somewhere"

    def submit(self) -> None:
        """Never called."""


def given(name: str, value: object) -> FunctionOptions:
    kind = "conda" if name in options_module._CONDA_KEYS else "virtualenv"
    return make_options(**{"kind": kind, name: value})


# ---------------------------------------------------------------- defaults


def test_the_defaults_are_those_of_fal() -> None:
    options = make_options()

    assert options == FunctionOptions()
    assert (options.kind, options.machine_type, options.max_multiplexing) == ("virtualenv", "XS", 1)
    assert options.app_files_ignore == list(DEFAULT_APP_FILES_IGNORE)
    assert options.keep_alive is None
    assert options.scaling() == Scaling(keep_alive=300.0)
    assert options.resources() == Resources()
    assert options.lease_seconds() == 86400.0


@pytest.mark.parametrize("name", sorted(OPTION_NAMES))
def test_every_option_is_accepted_and_kept(name: str) -> None:
    """Those that mean nothing on one's own machine too: code written for fal must run unchanged."""
    options = given(name, GOOD_VALUES[name])

    assert getattr(options, name) == GOOD_VALUES[name]


@pytest.mark.parametrize("name", sorted(OPTION_NAMES))
def test_none_stands_for_the_default(name: str) -> None:
    assert make_options(**{name: None}) == make_options()


def test_every_option_has_a_check() -> None:
    assert set(options_module._CHECKS) == OPTION_NAMES == set(GOOD_VALUES)


def test_force_env_build_is_another_name_of_force() -> None:
    assert make_options(force_env_build=True).force is True
    assert make_options(force=True).merged(force_env_build=False).force is False


def test_later_changes_to_a_list_do_not_change_the_options() -> None:
    requirements, layers = ["numpy"], [["numpy"], ["pandas"]]
    flat, stepped = make_options(requirements=requirements), make_options(requirements=layers)

    requirements.append("torch")
    layers[0].append("torch")

    assert flat.requirements == ["numpy"]
    assert stepped.requirements == [["numpy"], ["pandas"]]


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")

    options = make_options(num_gpus=numpy.int64(2), keep_alive=numpy.float32(2.5))

    assert (type(options.num_gpus), type(options.keep_alive)) == (int, float)


def test_a_host_may_be_an_object_or_a_name() -> None:
    host = SomeHost()

    assert make_options(host=host).host is host
    assert make_options(host="gpu-box").host == "gpu-box"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reqirements", "Unrecognised option 'reqirements'. Did you mean 'requirements'?"),
        ("machine", "Unrecognised option 'machine'. Did you mean 'machine_type'?"),
        ("timeout", "Unrecognised option 'timeout'. Did you mean 'request_timeout'?"),
        ("given", "Unrecognised option 'given'."),
        ("zzz", "Unrecognised option 'zzz'."),
    ],
)
def test_an_unknown_option_names_its_nearest_relative(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_options(**{name: 1})


def test_an_unknown_option_is_refused_when_merged_too() -> None:
    with pytest.raises(ValueError, match="Did you mean 'keep_alive'"):
        make_options().merged(keepalive=3)


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(ValueError, match="'docker'; the kinds are 'virtualenv', 'container', 'conda'"):
        make_options("docker")


@pytest.mark.parametrize(
    "value", ["numpy", ("numpy",), ["numpy", ["torch"]], [1], [["numpy"], "torch"], [[1]], {}]
)
def test_requirements_have_one_of_two_shapes(value: object) -> None:
    message = "requirements must be a list of strings or a list of lists of strings."

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_options(requirements=value)


@pytest.mark.parametrize(
    ("value", "named"),
    [("helpers", "'helpers'"), (("helpers",), r"\('helpers',\)"), (["a", 3], "item 1 is 3"), (5, "5")],
)
def test_wrong_local_modules_are_named_by_value_or_index(value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"local_python_modules must be a list of strings.*{named}"):
        make_options(local_python_modules=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keep_alive", -1),
        ("keep_alive", "10"),
        ("keep_alive", float("nan")),
        ("keep_alive", float("inf")),
        ("keep_alive", True),
        ("lease", -0.5),
        ("request_timeout", 0),
        ("startup_timeout", -1),
        ("scaling_delay", -1),
        ("max_multiplexing", 0),
        ("max_multiplexing", 1.5),
        ("max_multiplexing", True),
        ("min_concurrency", -1),
        ("max_concurrency", 0),
        ("concurrency_buffer", -1),
        ("concurrency_buffer_perc", -1),
        ("num_gpus", -1),
        ("num_gpus", "2"),
        ("exposed_port", 0),
        ("exposed_port", 65536),
        ("machine_type", ""),
        ("machine_type", []),
        ("machine_type", [1]),
        ("machine_type", 3),
        ("regions", "lab"),
        ("python_version", 3.11),
        ("python_version", "3"),
        ("python_version", "3.11; rm"),
        ("python_version", ""),
        ("resolver", "poetry"),
        ("serializer", "json"),
        ("setup_function", 3),
        ("metadata", [1]),
        ("serve", "yes"),
        ("compile_bytecode", 1),
        ("app_files", "data"),
        ("app_files", [3]),
        ("app_files", [""]),
        ("app_files_ignore", ["("]),
        ("app_files_context_dir", 3),
        ("skip_retry_conditions", ["never"]),
        ("host", 5),
        ("host", " "),
        ("env_dict", "x"),
        ("env_yml_str", ""),
        ("packages", "numpy"),
    ],
)
def test_a_wrong_value_is_refused_with_the_options_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^(item \d+ of )?{name}\b"):
        given(name, value)


def test_fewer_workers_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_concurrency \(1\).*min_concurrency \(2\)"):
        make_options(min_concurrency=2).merged(max_concurrency=1)


def test_conda_has_no_requirements() -> None:
    with pytest.raises(ValueError, match=r"^Unsupported option 'requirements' for environment kind 'conda'"):
        make_options("conda", requirements=["numpy"])


@pytest.mark.parametrize("kind", ["virtualenv", "container"])
def test_conda_options_need_the_kind_conda(kind: str) -> None:
    with pytest.raises(ValueError, match=f"^Unsupported option 'packages' for environment kind '{kind}'"):
        make_options(kind, packages=["numpy"])


@pytest.mark.parametrize("config", [{"image": object()}, {"kind": "container"}])
def test_app_files_do_not_go_with_a_container(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="app_files cannot be used with kind 'container'"):
        make_options(**config, app_files=["data"])


# ---------------------------------------------------------------- kinds


def test_an_image_makes_the_kind_container() -> None:
    assert make_options(image=object()).kind == "container"


def test_taking_the_image_away_takes_the_container_away() -> None:
    options = make_options(image=object())

    assert options.merged(image=None).kind == "virtualenv"
    assert options.merged(kind="virtualenv").image is None


@pytest.mark.parametrize(
    "config",
    [{"kind": "container"}, {"kind": "conda"}, {"image": object()}],
)
def test_what_cannot_run_yet_is_declared_and_refused_at_the_call(config: dict[str, Any]) -> None:
    options = make_options(**config)

    with pytest.raises(FalServerlessError, match="yet; "):
        options.check_runnable()


def test_the_advice_of_a_refused_call_works() -> None:
    make_options("conda", packages=["x"]).merged(packages=None, kind="virtualenv").check_runnable()
    make_options(image=object()).merged(kind="virtualenv", requirements=["numpy"]).check_runnable()


# ---------------------------------------------------------------- merging and views


def test_merging_changes_a_copy() -> None:
    options = make_options(requirements=["numpy"], machine_type="GPU", host="a")

    other = options.merged("b", machine_type="S", keep_alive=0)

    assert (options.host, options.machine_type, options.keep_alive) == ("a", "GPU", None)
    assert (other.host, other.machine_type, other.keep_alive) == ("b", "S", 0)
    assert other.requirements == ["numpy"]
    assert options.merged().host == "a"


def test_the_views_hold_what_was_given_in_three_groups() -> None:
    options = make_options(requirements=["numpy"], machine_type="XS", keep_alive=10, serve=True, regions=None)

    views = options.views

    assert views.host == {"machine_type": "XS", "keep_alive": 10.0}
    requirements = views.environment.pop("requirements")
    assert requirements[0] == "numpy"
    assert {line.partition(">=")[0] for line in requirements[1:]} >= {"fastapi", "uvicorn", "pydantic"}
    assert views.environment == {"kind": "virtualenv"}
    assert views.gateway == {"serve": True}


def test_what_serving_needs_stays_when_a_function_is_served_no_more() -> None:
    """So that a call finds the environment, and what is warm in it."""
    served = make_options(requirements=[["numpy"], ["torch"]], serve=True)

    other = served.merged(serve=False).merged(keep_alive=5)

    first, second = other.views.environment["requirements"]
    assert first == ["numpy"]
    assert second[:1] == ["torch"]
    assert any(line.startswith("fastapi") for line in second)
    assert not other.is_served
    assert make_options(serve=False).views.environment == {"kind": "virtualenv"}


def test_a_health_check_may_be_a_dictionary() -> None:
    options = make_options(exposed_port=8000, health_check_config={"path": "/health", "method": "GET"})

    assert options.health_check_config == HealthCheckConfig("/health", method="GET")
    for wrong in ({"method": "GET"}, {"path": "health"}, {"path": "/", "timeout": 3}, "/health"):
        with pytest.raises(ValueError, match="health_check_config must"):
            make_options(health_check_config=wrong)


def test_a_hosts_settings_count_where_the_function_says_nothing() -> None:
    silent, explicit = make_options(), make_options(keep_alive=0, lease=0)

    assert silent.scaling(host_keep_alive=60).keep_alive == 60
    assert explicit.scaling(host_keep_alive=60).keep_alive == 0
    assert silent.lease_seconds(host_lease=5) == 5
    assert explicit.lease_seconds(host_lease=5) == 0


def test_resources_and_scaling_survive_the_wire() -> None:
    """A value of another type than the message's (an int for a path, a NumPy number) would not."""
    names = ["machine_type", "num_gpus", "regions", "keep_alive", "min_concurrency", "max_concurrency"]
    names += ["concurrency_buffer", "concurrency_buffer_perc", "scaling_delay", "max_multiplexing"]
    options = make_options(**{name: GOOD_VALUES[name] for name in names})
    call = Call(
        kind="function",
        label="f",
        function=None,
        environment=EnvironmentSpec(python="3.11", layers=[]),
        resources=options.resources(),
        scaling=options.scaling(),
    )

    [frame] = FrameDecoder().feed(encode(Submit(run_id="r", template="t", arguments=[], call=call)))

    assert decode(frame) == Submit(run_id="r", template="t", arguments=[], call=call)
    assert options.resources().machine_types == ["GPU-H100", "GPU"]
    assert options.scaling().max_multiplexing == 4


def test_paths_may_be_path_objects() -> None:
    options = make_options(app_files=[Path("a/b"), "c"], app_files_context_dir=Path("project"))

    assert options.app_files == ["a/b", "c"]
    assert options.app_files_context_dir == "project"
