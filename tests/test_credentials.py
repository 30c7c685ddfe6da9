"""Keys: what they put into requests, where they are looked for, how the user's own is kept."""

from __future__ import annotations

import pickle
import stat
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.errors import ConfigurationError
from fal_notebook.credentials import Credentials, FalServerlessKeyCredentials, key_credentials, make_key

if TYPE_CHECKING:
    from pathlib import Path

KEY = FalServerlessKeyCredentials("an-id", "hush:hush")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAL_NOTEBOOK_CONFIG", str(tmp_path / "config"))
    for name in ("FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "config"


def colab(monkeypatch: pytest.MonkeyPatch, get: Any) -> None:
    """Stand in for Colab, which runs nowhere else."""
    userdata = types.ModuleType("google.colab.userdata")
    userdata.SecretNotFoundError = type("SecretNotFoundError", (Exception,), {})  # type: ignore[attr-defined]
    userdata.NotebookAccessError = type("NotebookAccessError", (Exception,), {})  # type: ignore[attr-defined]
    userdata.get = lambda name: get(userdata, name)  # type: ignore[attr-defined]
    package = types.ModuleType("google.colab")
    package.userdata = userdata  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "google.colab.userdata", userdata)


# ---------------------------------------------------------------- the class


def test_a_key_is_an_authorization_header() -> None:
    assert KEY.to_headers() == {"Authorization": "Key an-id:hush:hush"}


def test_the_headers_are_a_new_dict_each_time() -> None:
    KEY.to_headers()["Authorization"] = "changed"

    assert KEY.to_headers()["Authorization"] == "Key an-id:hush:hush"


def test_keys_are_equal_by_value_and_are_credentials() -> None:
    assert FalServerlessKeyCredentials("an-id", "hush:hush") == KEY
    assert FalServerlessKeyCredentials(key_id="an-id", key_secret="other") != KEY
    assert isinstance(KEY, Credentials)
    assert Credentials().to_headers() == {}


def test_a_key_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(KEY)) == KEY


def test_the_repr_shows_the_id_and_hides_the_secret() -> None:
    assert "an-id" in repr(KEY)
    assert "hush" not in repr(KEY) + str(KEY)


@pytest.mark.parametrize(
    ("key_id", "secret"),
    [
        ("", "s"),
        ("i", ""),
        ("a:b", "s"),
        ("i", "sec\r\nX-Evil: 1"),
        ("i d", "s"),
        ("i", "schl\xfcssel"),
        (None, "s"),
    ],
)
def test_what_cannot_be_in_a_header_is_refused(key_id: Any, secret: str) -> None:
    """A line break would smuggle a header in."""
    with pytest.raises(ValueError, match="must be printable ASCII") as caught:
        FalServerlessKeyCredentials(key_id, secret)

    assert not secret or len(secret) == 1 or secret not in str(caught.value)


def test_without_grpcio_to_grpc_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)

    with pytest.raises(ImportError, match="needs grpcio"):
        KEY.to_grpc()


def test_with_grpcio_every_call_carries_the_key(tmp_path: Path) -> None:
    """A real call over TLS, in a process of its own, since grpc reads the roots from its environment."""
    pytest.importorskip("grpc", reason="install grpcio (it is in the test group)")
    done = subprocess.run(
        [sys.executable, "-c", GRPC_CALL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hush:hush", "an-id"]


GRPC_CALL = """
import datetime, os, sys
from concurrent import futures
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

folder = Path(sys.argv[1])
key = ec.generate_private_key(ec.SECP256R1())
name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
now = datetime.datetime.now(datetime.timezone.utc)
certificate = (
    x509.CertificateBuilder()
    .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    .sign(key, hashes.SHA256())
)
chain = certificate.public_bytes(serialization.Encoding.PEM)
private = key.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
(folder / "roots.pem").write_bytes(chain)
os.environ["GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"] = str(folder / "roots.pem")

import grpc
from fal_notebook.credentials import FalServerlessKeyCredentials

class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        sent = dict(details.invocation_metadata)
        answer = f"{sent['auth-key']} {sent['auth-key-id']}".encode()
        return grpc.unary_unary_rpc_method_handler(lambda request, context: answer)

server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Echo()])
port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(private, chain)]))
server.start()
credentials = FalServerlessKeyCredentials("an-id", "hush:hush").to_grpc()
with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
    print(channel.unary_unary("/test/Echo")(b"", timeout=20).decode())
server.stop(None).wait(10)
"""


# ---------------------------------------------------------------- where a key is looked for


def test_without_any_key_there_is_none() -> None:
    assert key_credentials() is None


def test_fal_key_holds_id_and_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first colon parts them; a secret may hold others."""
    monkeypatch.setenv("FAL_KEY", " an-id:hush:hush\n")

    assert key_credentials() == KEY


def test_id_and_secret_may_stand_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_KEY_ID", "an-id")
    monkeypatch.setenv("FAL_KEY_SECRET", "hush:hush")

    assert key_credentials() == KEY


def test_fal_key_comes_before_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_KEY", "an-id:hush:hush")
    monkeypatch.setenv("FAL_KEY_ID", "other")
    monkeypatch.setenv("FAL_KEY_SECRET", "other")

    assert key_credentials() == KEY


@pytest.mark.parametrize("text", ["hush", ":hush", "an-id:", "an-id:hu sh", "an-id:h\xfcsh"])
def test_a_malformed_key_is_a_clear_error_without_the_secret(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAL_KEY", text)

    with pytest.raises(ConfigurationError, match=r"FAL_KEY is not a key.*'<id>:<secret>'") as caught:
        key_credentials()

    assert "hush" not in str(caught.value)
    assert "hu sh" not in str(caught.value)


@pytest.mark.parametrize("name", ["FAL_KEY_ID", "FAL_KEY_SECRET"])
def test_half_a_key_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "half")

    with pytest.raises(ConfigurationError, match=f"{name} is set and .* is not"):
        key_credentials()


def test_in_colab_the_notebooks_secret_is_the_last_place(monkeypatch: pytest.MonkeyPatch) -> None:
    colab(monkeypatch, lambda userdata, name: {"FAL_KEY": "an-id:hush:hush"}[name])

    assert key_credentials() == KEY

    monkeypatch.setenv("FAL_KEY", "an-id:from-the-environment")
    assert key_credentials() == FalServerlessKeyCredentials("an-id", "from-the-environment")


@pytest.mark.parametrize("error", ["SecretNotFoundError", "NotebookAccessError"])
def test_a_colab_user_who_gives_no_secret_has_none(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(userdata: Any, name: str) -> str:
        raise getattr(userdata, error)(name)

    colab(monkeypatch, refuse)

    assert key_credentials() is None


def test_colab_not_answering_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(userdata: Any, name: str) -> str:
        raise TimeoutError("no answer")

    colab(monkeypatch, hang)

    with pytest.raises(ConfigurationError, match="no answer; set the environment variable FAL_KEY"):
        key_credentials()


def test_importing_looks_nothing_up() -> None:
    """Even a malformed key in the environment is not looked at before somebody asks."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import fal_notebook; print(fal_notebook.FalServerlessKeyCredentials('a', 'b'))",
        ],
        env={"FAL_KEY": "malformed"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "key_id='a'" in done.stdout


# ---------------------------------------------------------------- the user's own key


def test_the_first_call_makes_a_key_and_later_ones_give_it(folder: Path) -> None:
    made = make_key()

    assert make_key() == made
    assert (len(made.key_id), len(made.key_secret)) == (16, 64)
    assert (folder / "key").read_text() == f"{made.key_id}:{made.key_secret}\n"


def test_only_the_owner_can_read_the_key(folder: Path) -> None:
    make_key()

    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_many_first_calls_make_one_key(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: make_key(), range(16)))

    assert len(made) == 1
    assert [path.name for path in folder.iterdir()] == ["key"]


def test_a_key_that_others_can_read_is_not_used(folder: Path) -> None:
    make_key()
    (folder / "key").chmod(0o640)

    with pytest.raises(ConfigurationError, match=r"others can read your key.*chmod 600"):
        make_key()


def test_a_malformed_file_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "key").write_text("not a key\n")
    (folder / "key").chmod(0o600)

    with pytest.raises(ConfigurationError, match="delete it to have a new key made"):
        make_key()

    assert (folder / "key").read_text() == "not a key\n"


def test_a_folder_that_cannot_be_written_is_an_error(folder: Path) -> None:
    folder.write_text("a file where the folder should be")

    with pytest.raises(ConfigurationError, match=r"cannot be kept in .*FAL_NOTEBOOK_CONFIG"):
        make_key()
