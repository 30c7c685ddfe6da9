"""What code written for the fal SDK imports is found at the same places, whichever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fal_notebook as fal
from fal_agent.runtime.app import App

NAMES = {
    "": "App HealthCheck FalServerlessKeyCredentials ContainerImage function cached endpoint realtime "
    "sync_dir local serverless cloud isolated wrap_app apps __version__ toolkit exceptions",
    ".api": "FalServerlessError UserFunctionException FalSerializationError FalMissingDependencyError "
    "Options IsolatedFunction LocalHost RouteSignature",
    ".app": "App AppClient AppClientError AppSpawnInfo RequestContext endpoint realtime wrap_app",
    ".apps": "run submit stream ws",
    ".container": "ContainerImage",
    ".exceptions": "FalServerlessException AppException FieldException RequestCancelledException "
    "FileTooLargeError AppFileUploadException GPUException GPUOutOfMemoryException CUDAOutOfMemoryException "
    "catch_gpu_exceptions",
    ".ref": "get_current_app",
    ".toolkit": "File Image Video Audio CompressedFile download_file download_model_weights clone_repository "
    "FAL_PERSISTENT_DIR FAL_MODEL_WEIGHTS_DIR FAL_REPOSITORY_DIR get_gpu_type load_inductor_cache "
    "sync_inductor_cache synchronized_inductor_cache ImageSizeInput get_image_size FalBaseModel Field Hidden",
    ".toolkit.audio": "Audio",
    ".toolkit.compilation": "load_inductor_cache sync_inductor_cache synchronized_inductor_cache",
    ".toolkit.file": "File CompressedFile",
    ".toolkit.image": "Image ImageSize ImageSizeInput get_image_size",
    ".toolkit.pydantic": "FalBaseModel Field Hidden",
    ".toolkit.video": "Video",
    ".toolkit.utils": "download_file download_model_weights clone_repository",
}


@pytest.mark.parametrize(("module", "names"), NAMES.items())
def test_a_name_is_imported_from_where_the_sdk_has_it(module: str, names: str) -> None:
    statement = f"from fal_notebook{module} import {', '.join(names.split())}"

    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_a_submodule_can_be_imported_by_its_dotted_name() -> None:
    lines = [f"import fal_notebook{module}" for module in NAMES]
    code = "\n".join([*lines, "assert fal_notebook.toolkit.image.Image", "assert fal_notebook.container"])

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("statement", ["from fal_notebook import App", "from fal_notebook.app import App"])
def test_an_app_can_be_spawned_wherever_its_base_came_from(statement: str) -> None:
    """On the inline host it is refused; what matters is that the question gets there."""
    code = f"{statement}\nclass Small(App): ...\nSmall.spawn(host='inline')"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert "serves no apps in the background" in done.stderr


def test_the_platforms_hosts_are_the_current_host() -> None:
    for host in (fal.cloud, fal.serverless):
        assert fal.function(host=host)(abs).host is fal.function(abs).host


def test_wrapping_an_app_changes_a_copy() -> None:
    class Plain(fal.App, keep_alive=7, machine_type="M"):
        """What it is for."""

        @fal.endpoint("/")
        def run(self) -> str:
            return ""

    wrapped = fal.wrap_app(Plain, keep_alive=9)

    assert (wrapped.app_name, wrapped.app_auth, wrapped.__name__) == ("plain", None, "Plain")
    assert issubclass(wrapped.app, App)
    assert wrapped.app.host_kwargs["keep_alive"] == 9
    assert wrapped.app.machine_type == "M"
    assert wrapped.app.get_endpoints() == ["/"]
    assert Plain.host_kwargs["keep_alive"] == 7
    assert fal.wrap_app(Plain).app is Plain


def test_wrapping_refuses_what_is_no_setting() -> None:
    class Plain(fal.App):
        @fal.endpoint("/")
        def run(self) -> str:
            return ""

    with pytest.raises(ValueError, match="Did you mean 'keep_alive'"):
        fal.wrap_app(Plain, keep_alife=9)
