"""Settings: what hosts.toml may say, what its mistakes are called, and how it is written."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import ConfigurationError
from fal_notebook import config
from fal_notebook.config import HostSettings, known_host_names, load, remember_host, ssh_aliases

if TYPE_CHECKING:
    from pathlib import Path

FULL = """\
# my machines
default = "gpu-box"

[hosts.gpu-box]
ssh = "me@gpu.example.org:2222"  # the one under the desk
labels = ["lab", "h100"]
link = "paramiko"
python = "/usr/bin/python3.12"
root = "~/scratch/fal"
lease = 3600
keep_alive = 600.5
files_gb = 2.5
files_days = 7

[hosts."other.box"]
labels = []

[hosts.local]
keep_alive = 1
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAL_NOTEBOOK_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("FAL_SSH_CONFIG", str(tmp_path / "ssh_config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FAL_HOST", raising=False)
    return tmp_path / "config"


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "hosts.toml"
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- reading


def test_without_a_file_the_settings_are_empty(folder: Path) -> None:
    settings = load()

    assert (settings.default, settings.names, settings.path) == (None, [], folder / "hosts.toml")
    assert not folder.exists()


def test_the_folder_is_the_platforms_own_unless_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FAL_NOTEBOOK_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))

    assert config.config_folder().name == "fal_notebook"
    assert tmp_path in config.config_folder().parents


def test_every_setting_is_read(folder: Path) -> None:
    write(folder, FULL)

    settings = load()

    assert settings.default == "gpu-box"
    assert settings.names == ["gpu-box", "other.box", "local"]
    assert settings.host("gpu-box") == HostSettings(
        name="gpu-box",
        link="paramiko",
        ssh="me@gpu.example.org:2222",
        labels=("lab", "h100"),
        python="/usr/bin/python3.12",
        root="~/scratch/fal",
        lease=3600,
        keep_alive=600.5,
        files_gb=2.5,
        files_days=7,
    )
    assert settings.host("other.box") == HostSettings("other.box", ssh="other.box")
    assert settings.host("local") == HostSettings("local", ssh=None, keep_alive=1)


def test_a_name_that_is_not_in_the_file_is_one_for_ssh() -> None:
    assert load().host("me@box:22") == HostSettings("me@box:22", ssh="me@box:22")
    assert load().host("local").ssh is None


@pytest.mark.parametrize("name", ["", "-oProxyCommand=x", "a b", "a\nb", "a\x00"])
def test_what_ssh_would_take_for_something_else_is_no_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be the name of a host"):
        load().host(name)


def test_fal_host_overrules_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, FULL)
    monkeypatch.setenv("FAL_HOST", "elsewhere")

    assert load().default == "elsewhere"
    assert load().names == ["gpu-box", "other.box", "local"]


def test_a_blank_fal_host_says_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, FULL)
    monkeypatch.setenv("FAL_HOST", " ")

    assert load().default == "gpu-box"


def test_a_wrong_fal_host_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_HOST", "-x")

    with pytest.raises(ConfigurationError, match="FAL_HOST='-x'"):
        load()


def test_an_edit_of_the_file_is_seen_at_once(folder: Path) -> None:
    path = write(folder, FULL)
    load()

    path.write_text(FULL.replace("3600", "3601"), encoding="utf-8")
    assert load().host("gpu-box").lease == 3601

    path.unlink()
    assert load().names == []


def test_an_unchanged_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call asks for the settings of its host."""
    write(folder, FULL)
    read: list[Path] = []
    original = config._read
    monkeypatch.setattr(config, "_read", lambda path: (read.append(path), original(path))[1])

    assert load() == load()

    assert len(read) == 1


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[hosts.a]\n\nlables = ["x"]',
            "line 3 ([hosts.a]): unknown setting 'lables'; did you mean 'labels'?",
        ),
        (
            '[hosts."a"]\nzzz = 1',
            "line 2 ([hosts.a]): unknown setting 'zzz'; known are ssh, labels, link, python",
        ),
        ('\ndefalt = "a"', "line 2: unknown setting 'defalt'; did you mean 'default'?"),
        ("default = 3", "line 1: 'default' must be the name of a host, not 3"),
        ('default = ""', "line 1: 'default' must be the name of a host, not ''"),
        ("hosts = 3", "line 1: 'hosts' must be tables such as [hosts.gpu-box], not 3"),
        ('[hosts]\na = "b"', ": 'a' must be a table: [hosts.a], not 'b'"),
        (
            '[hosts.b]\nlease = 1\n[hosts.a]\nlease = "1h"',
            "line 4 ([hosts.a]): 'lease' must be a number of seconds",
        ),
        ("[hosts.a]\nlease = -1", "'lease' must be a number of seconds, 0 or more, not -1"),
        ("[hosts.a]\nlease = inf", "'lease' must be a number of seconds, 0 or more, not inf"),
        ("[hosts.a]\nkeep_alive = true", "'keep_alive' must be a number of seconds, 0 or more, not True"),
        ('[hosts.a]\nlabels = "x"', "'labels' must be a list of strings, not 'x'"),
        ("[hosts.a]\nlabels = [1]", "'labels' must be a list of strings, not [1]"),
        ('[hosts.a]\nlink = "telnet"', "'link' must be one of 'paramiko', 'openssh', not 'telnet'"),
        ('[hosts.a]\nssh = "-oX"', "'ssh' must be an alias of ~/.ssh/config"),
        ('[hosts.a]\nssh = "ssh box"', "'ssh' must be an alias of ~/.ssh/config"),
        ('[hosts.a]\nroot = "scratch"', "'root' must be a folder on the host, from / or ~/, not 'scratch'"),
        ('[hosts.a]\npython = "/a\\nb"', "'python' must be the path of a Python on the host"),
        ('[hosts.local]\nssh = "x"', "'ssh' must be left out: 'local' is this machine"),
        ('[hosts."-a"]\nlease = 1', "'-a' cannot be the name of a host"),
        ("hosts = {a = {lease = -1}}", " ([hosts.a]): 'lease' must be a number of seconds"),
        ("[hosts.a\n", "is not TOML: "),
    ],
)
def test_a_mistake_is_named_with_its_file_line_and_remedy(folder: Path, text: str, message: str) -> None:
    path = write(folder, text)

    with pytest.raises(ConfigurationError) as caught:
        load()

    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_broken_toml_says_in_which_line(folder: Path) -> None:
    write(folder, 'default = "a"\n[hosts.a\n')

    with pytest.raises(ConfigurationError, match="line 2"):
        load()


def test_a_file_that_is_not_text_is_an_error(folder: Path) -> None:
    write(folder, "").write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigurationError, match=r"hosts\.toml cannot be read"):
        load()


def test_a_folder_in_the_files_place_is_an_error(folder: Path) -> None:
    (folder / "hosts.toml").mkdir(parents=True)

    with pytest.raises(ConfigurationError, match="cannot be read"):
        load()


# ---------------------------------------------------------------- writing


def test_a_remembered_host_is_there_the_next_time(folder: Path) -> None:
    remembered = remember_host("gpu-box", ssh="me@box", labels=("lab",), keep_alive=5, default=True)

    assert remembered == HostSettings("gpu-box", ssh="me@box", labels=("lab",), keep_alive=5)
    assert load().host("gpu-box") == remembered
    assert load().default == "gpu-box"


def test_a_host_may_be_remembered_by_name_alone() -> None:
    assert remember_host("gpu-box") == HostSettings("gpu-box", ssh="gpu-box")
    assert load().names == ["gpu-box"]


def test_the_file_is_for_its_owner_alone(folder: Path) -> None:
    path = write(folder, FULL)
    path.chmod(0o644)

    remember_host("new")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_new_folder_is_for_its_owner_alone(folder: Path) -> None:
    remember_host("new")

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [item.name for item in folder.iterdir()] == ["hosts.toml"]


def test_what_the_file_said_and_its_comments_stay(folder: Path) -> None:
    path = write(folder, FULL)

    remember_host("gpu-box", keep_alive=7)
    remember_host("new.one", ssh="new")

    text = path.read_text(encoding="utf-8")
    assert text.startswith(FULL.replace("600.5", "7").rstrip())
    assert load().names == ["gpu-box", "other.box", "local", "new.one"]


def test_none_takes_a_setting_out(folder: Path) -> None:
    write(folder, FULL)

    assert remember_host("gpu-box", lease=None, root=None).lease is None
    assert "root" not in (folder / "hosts.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "settings"),
    [("a", {"lables": ["x"]}), ("a", {"lease": -1}), ("-a", {}), ("local", {"ssh": "x"})],
)
def test_a_wrong_setting_is_not_written(folder: Path, name: str, settings: dict[str, object]) -> None:
    path = write(folder, FULL)

    with pytest.raises(ConfigurationError):
        remember_host(name, **settings)

    assert path.read_text(encoding="utf-8") == FULL


def test_a_file_with_a_mistake_is_left_alone(folder: Path) -> None:
    path = write(folder, "[hosts.a\n")

    with pytest.raises(ConfigurationError, match="is not TOML"):
        remember_host("b")

    assert path.read_text(encoding="utf-8") == "[hosts.a\n"


def test_a_link_to_the_file_stays_a_link(folder: Path, tmp_path: Path) -> None:
    """Many keep their settings in a repository of dotfiles."""
    real = tmp_path / "dotfiles.toml"
    real.write_text(FULL, encoding="utf-8")
    folder.mkdir()
    (folder / "hosts.toml").symlink_to(real)

    remember_host("new")

    assert (folder / "hosts.toml").is_symlink()
    assert "new" in real.read_text(encoding="utf-8")


def test_a_place_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("FAL_NOTEBOOK_CONFIG", str(tmp_path / "file" / "config"))

    with pytest.raises(ConfigurationError, match=r"cannot be (written|read): "):
        remember_host("a")


def test_processes_that_write_at_once_lose_nothing(folder: Path) -> None:
    code = (
        "import sys; from fal_notebook.config import remember_host\n"
        "for i in range(5): remember_host(f'{sys.argv[1]}-{i}')"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, name], env=environment()) for name in "abc"]

    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert sorted(load().names) == sorted(f"{name}-{i}" for name in "abc" for i in range(5))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


# ---------------------------------------------------------------- names


def test_the_names_that_ssh_knows_are_found(tmp_path: Path) -> None:
    (tmp_path / ".ssh" / "conf.d").mkdir(parents=True)
    (tmp_path / ".ssh" / "conf.d" / "work").write_text("host deep\n", encoding="utf-8")
    (tmp_path / "more").write_text(f"Include {tmp_path}/more\nHost=equals\n", encoding="utf-8")
    (tmp_path / "ssh_config").write_text(
        'Include conf.d/* ~/more missing/*\nHost a b *.example.org !c d? "q r"  # comment\n'
        "  HostName h\nHost\tb e\n"
        f'HostName no\nHostKeyAlias no\n# Host no\nHost "open\nMatch host no\nInclude {tmp_path}\n',
        encoding="utf-8",
    )

    assert ssh_aliases() == ["deep", "equals", "a", "b", "q r", "e"]


def test_without_a_file_ssh_knows_no_names() -> None:
    assert ssh_aliases() == []


def test_all_known_names_are_listed_once(folder: Path, tmp_path: Path) -> None:
    write(folder, FULL)
    (tmp_path / "ssh_config").write_text("Host gpu-box third\n", encoding="utf-8")

    assert known_host_names() == ["local", "gpu-box", "other.box", "third"]


def test_reading_the_settings_needs_no_writer_of_toml() -> None:
    """`tomlkit` takes longer to import than the whole package may."""
    code = "import sys; from fal_notebook.config import load; load(); print(sorted(sys.modules))"

    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
        timeout=60,
    ).stdout

    assert not re.search(r"'(tomlkit|paramiko|IPython|typer)'", output)
