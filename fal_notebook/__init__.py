"""Run notebook cells and functions on your own machines over SSH.

    import fal_notebook as fal

    fal.connect("gpu-box")                       # any name that `ssh` knows

    @fal.function(requirements=["scikit-learn"])
    def score(batch): ...

    score(X)                                     # runs there, prints here

In a notebook, `%load_ext fal_notebook` adds `%%fal` for cells and `%fal` for the rest.

Everything is imported on first use: `import fal_notebook` is quick, and works in workers, which have
only the standard library and cloudpickle.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fal_agent.runtime.app import App
    from fal_agent.runtime.cached import cached
    from fal_agent.runtime.progress import progress
    from fal_agent.runtime.realtime import realtime
    from fal_agent.runtime.routes import HealthCheck, endpoint
    from fal_notebook import api, app, apps, container, exceptions, hosts, ref, toolkit
    from fal_notebook.attaching import attach, prune, runs
    from fal_notebook.container import ContainerImage
    from fal_notebook.credentials import FalServerlessKeyCredentials
    from fal_notebook.functions import function
    from fal_notebook.functions import function as isolated
    from fal_notebook.hosts.base import Host
    from fal_notebook.hosts.inline import InlineHost
    from fal_notebook.hosts.local import LocalHost
    from fal_notebook.hosts.registry import connect
    from fal_notebook.hosts.ssh import SSHHost
    from fal_notebook.run import Run
    from fal_notebook.syncing import sync_dir
    from fal_notebook.wrapping import wrap_app

    local: Host
    cloud: None
    serverless: None

__version__ = "0.1.0"

__all__ = [
    "App",
    "ContainerImage",
    "FalServerlessKeyCredentials",
    "HealthCheck",
    "InlineHost",
    "LocalHost",
    "Run",
    "SSHHost",
    "__version__",
    "api",
    "app",
    "apps",
    "attach",
    "cached",
    "cloud",
    "connect",
    "container",
    "endpoint",
    "exceptions",
    "function",
    "hosts",
    "isolated",
    "local",
    "progress",
    "prune",
    "realtime",
    "ref",
    "runs",
    "serverless",
    "sync_dir",
    "toolkit",
    "wrap_app",
]

_HOME = {
    "App": "fal_agent.runtime.app",
    "ContainerImage": "fal_notebook.container",
    "FalServerlessKeyCredentials": "fal_notebook.credentials",
    "HealthCheck": "fal_agent.runtime.routes",
    "InlineHost": "fal_notebook.hosts.inline",
    "LocalHost": "fal_notebook.hosts.local",
    "Run": "fal_notebook.run",
    "SSHHost": "fal_notebook.hosts.ssh",
    "attach": "fal_notebook.attaching",
    "cached": "fal_agent.runtime.cached",
    "connect": "fal_notebook.hosts.registry",
    "endpoint": "fal_agent.runtime.routes",
    "function": "fal_notebook.functions",
    "progress": "fal_agent.runtime.progress",
    "prune": "fal_notebook.attaching",
    "realtime": "fal_agent.runtime.realtime",
    "runs": "fal_notebook.attaching",
    "sync_dir": "fal_notebook.syncing",
    "wrap_app": "fal_notebook.wrapping",
}
_MODULES = ("api", "app", "apps", "container", "exceptions", "hosts", "ref", "toolkit")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module = importlib.import_module(_HOME[name])
        value = getattr(module, name)
        if name == "App":
            module.set_launcher(_spawn)
        elif name == "progress":
            module.tell_by(_draw_bar, by_default=True)  # a worker has said before who hears of them
    elif name in _MODULES:
        value = importlib.import_module(f"fal_notebook.{name}")
    elif name == "isolated":  # the old name of `function`
        value = __getattr__("function")
    elif name in ("cloud", "serverless"):  # the platform's hosts; here: whichever host is the current one
        value = None
    elif name == "local":
        value = importlib.import_module("fal_notebook.hosts.registry").local()
    else:
        raise AttributeError(f"module 'fal_notebook' has no attribute {name!r}")
    globals()[name] = value
    return value


def _spawn(cls: Any, **options: Any) -> Any:
    """Do what `App.spawn()` asks for."""
    from fal_notebook.spawning import spawn

    return spawn(cls, **options)


def _draw_bar(step: Any) -> None:
    """Show how far a loop in this very process has come."""
    from fal_notebook.display.bars import draw_here

    draw_here(step)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(ipython: Any) -> None:
    """Add the magics: what `%load_ext fal_notebook` calls."""
    from fal_notebook.magics import load

    load(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """Take the magics away again: what `%unload_ext fal_notebook` calls."""
    from fal_notebook.magics import unload

    unload(ipython)
