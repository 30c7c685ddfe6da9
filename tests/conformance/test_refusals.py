"""What cannot work is refused at once, in words that say what to do."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_notebook import exceptions
from fal_notebook.hosts import registry
from fal_notebook.hosts.ssh import SSHHost

if TYPE_CHECKING:
    from pathlib import Path

    from support.sshd import SSHServer

    from fal_notebook.hosts.base import Host

OTHER_PYTHON = f"3.{sys.version_info.minor - 1}"


def test_another_python_version_is_refused_before_anything_is_built(agent_host: Host) -> None:
    @fal.function(host=agent_host, python_version=OTHER_PYTHON)
    def one() -> int:
        return 1

    before = {item["name"] for item in agent_host.ask("environments")}
    with pytest.raises(exceptions.FalServerlessError) as caught:
        one()

    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert ours in str(caught.value)
    assert OTHER_PYTHON in str(caught.value)
    assert {item["name"] for item in agent_host.ask("environments")} == before


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://example.com/simple numpy",
        "-e .",
        "-r requirements.txt",
        "numpy\n--extra-index-url https://example.com",
        "numpy; rm -rf /",
        "numpy $(touch /tmp/owned)",
        "",
    ],
)
def test_a_requirement_line_that_is_not_one_is_refused(host: Host, line: str) -> None:
    def declare_and_call() -> int:
        @fal.function(host=host, requirements=[line])
        def one() -> int:
            return 1

        value: int = one()
        return value

    with pytest.raises(ValueError, match=r"(?i)requirement"):
        declare_and_call()


def test_a_requirement_that_does_not_exist_is_told_in_uvs_words(agent_host: Host) -> None:
    @fal.function(host=agent_host, requirements=["fal-tests-no-such-distribution==1.0"])
    def one() -> int:
        return 1

    with pytest.raises(exceptions.EnvironmentBuildError, match="fal-tests-no-such-distribution"):
        one()

    assert one.on(requirements=None)() == 1


def test_requirements_that_conflict_are_told_in_uvs_words(agent_host: Host) -> None:
    @fal.function(host=agent_host, requirements=["idna==3.10", "idna==3.9"])
    def one() -> int:
        return 1

    with pytest.raises(exceptions.EnvironmentBuildError, match="idna"):
        one()


def test_a_machine_that_is_not_there_is_refused(agent_host: Host) -> None:
    @fal.function(host=agent_host, machine_type="GPU-H100")
    def one() -> int:
        return 1

    with pytest.raises(exceptions.ResourceError, match="H100") as caught:
        one()

    assert agent_host.name in str(caught.value)
    assert one.on(machine_type="XS")() == 1


def test_a_cell_on_the_inline_host_is_refused() -> None:
    from fal_agent.wire import Call, EnvironmentSpec
    from fal_notebook.payload import make_parcel

    call = Call(kind="cell", label="x", function=None, environment=EnvironmentSpec("3.11", [[]]))

    with pytest.raises(exceptions.FalServerlessError, match="without %%fal"):
        registry.get_host("inline").submit(make_parcel(call, None, []), lambda _received: None)


def one_call(host: Host) -> int:
    @fal.function(host=host)
    def one() -> int:
        return 1

    return one()


def test_a_host_that_does_not_answer_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "ssh_config"
    config.write_text("Host nobody\n  HostName 127.0.0.1\n  Port 1\n")
    monkeypatch.setenv("FAL_SSH_CONFIG", str(config))

    with pytest.raises(exceptions.HostUnreachableError, match="nobody"):
        one_call(SSHHost("nobody"))


def test_a_name_that_does_not_resolve_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "ssh_config"
    config.write_text("Host nowhere\n  HostName no-such-machine.invalid\n")
    monkeypatch.setenv("FAL_SSH_CONFIG", str(config))

    with pytest.raises(exceptions.HostUnreachableError, match=r"no-such-machine\.invalid|nowhere"):
        one_call(SSHHost("nowhere"))


def test_a_user_whom_the_host_refuses_is_an_error(
    ssh_server: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "ssh_config"
    block = ssh_server.host_block.replace(f"Host {ssh_server.name}", "Host refused")
    config.write_text(block.replace(f"User {ssh_server.user}", "User nobody-here"))
    monkeypatch.setenv("FAL_SSH_CONFIG", str(config))

    with pytest.raises(exceptions.AuthenticationError, match="nobody-here"):
        one_call(SSHHost("refused"))


def test_a_changed_host_key_is_refused(
    ssh_server: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    key = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{ssh_server.port} {key}\n")
    config = tmp_path / "ssh_config"
    config.write_text(ssh_server.host_block.replace(str(ssh_server.known_hosts), str(known)))
    monkeypatch.setenv("FAL_SSH_CONFIG", str(config))

    with pytest.raises(exceptions.HostKeyError):
        one_call(SSHHost(ssh_server.name))


def test_a_refusal_says_what_the_other_connected_hosts_could_give(ssh_host: Any) -> None:
    def one() -> int:
        return 1

    ssh_host.connect()
    attic = fal.function(host="local", machine_type="attic")(one)
    with pytest.raises(exceptions.ResourceError, match=r"label.*\n'gpu-box' can run it: host='gpu-box'$"):
        attic()
    assert attic.on(host="gpu-box")() == 1

    cellar = fal.function(host="local", machine_type="cellar")(one)
    with pytest.raises(exceptions.ResourceError, match=r"'gpu-box' cannot either: .* the labels attic"):
        cellar()


MODEL = """
import fal_notebook as fal
from pydantic import BaseModel

class Point(BaseModel):
    x: int

@fal.function(host={host!r}, requirements=["pydantic<2"])
def read(point):
    return point.x

@fal.function(host={host!r}, requirements=["pydantic<2"])
def make(x):
    return Point(x=x).x

@fal.function(host={host!r}, requirements=["pydantic<2"])
def version(x):
    import pydantic
    return pydantic.VERSION[:2]

print(version(1))
for call in (lambda: read(Point(x=1)), lambda: make(1), lambda: make(1)):
    try:
        print(call())
    except fal.exceptions.FalServerlessError as error:
        print(error)
"""


def test_models_of_another_pydantic_are_refused_before_they_are_opened(agent_host: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MODEL.format(host=agent_host.name)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.stdout, done.stderr
    version, *refusals = done.stdout.splitlines()
    assert version == "1.", done.stderr
    assert len(refusals) == 3
    for refusal in refusals:
        assert "environment pydantic 1." in refusal
        assert 'Ask for "pydantic>=2,<3"' in refusal
