"""The peers, each used as its documentation says, on the same machine: `peers.py NAME` measures one round.

Each runs in its own process, which ends what it started; `calls.py` ends its whole process group
afterwards in any case.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import Figures, bulk, calls, many, noop, report, size_of

WORKERS = 2


def measure_ray() -> Figures:
    """An actor (the warm process that fal_notebook's worker is) and plain tasks."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:

        class Actor:
            def call(self, value: int) -> int:
                return value

            def size_of(self, array: Any) -> int:
                return size_of(array)

        actor: Any = ray.remote(Actor).remote()
        task: Any = ray.remote(noop)
        return {
            **calls("ray actor", lambda: ray.get(actor.call.remote(1)), count=1_000),
            **calls("ray task", lambda: ray.get(task.remote(1)), count=500),
            **many("ray task", lambda values: ray.get([task.remote(value) for value in values])),
            **bulk("ray actor", lambda array: ray.get(actor.size_of.remote(array))),
        }
    finally:
        ray.shutdown()


def measure_dask() -> Figures:
    """`Client.submit` to worker processes."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        Client(cluster) as client,
    ):
        # pure=False: else the second call would be the first one's remembered answer
        return {
            **calls("dask submit", lambda: client.submit(noop, 1, pure=False).result(), count=300),
            **many("dask map", lambda values: client.gather(client.map(noop, values, pure=False))),
            **bulk("dask submit", lambda array: client.submit(size_of, array, pure=False).result()),
        }


def measure_ipyparallel() -> Figures:
    """`apply_sync` on one engine, as from a notebook."""
    import ipyparallel

    with tempfile.TemporaryDirectory() as folder:
        os.environ["IPYTHONDIR"] = folder
        with ipyparallel.Cluster(n=1, log_level=40) as client:
            view = client[0]
            return {
                **calls("ipyparallel apply_sync", lambda: view.apply_sync(noop, 1), count=300),
                **many("ipyparallel map, one message", lambda values: list(view.map_sync(noop, values))),
                **bulk("ipyparallel apply_sync", lambda array: view.apply_sync(size_of, array)),
            }


def measure_loky() -> Figures:
    """A reusable executor of two processes."""
    from loky import get_reusable_executor

    executor = get_reusable_executor(max_workers=WORKERS, timeout=300)
    try:
        return {
            **calls("loky submit", lambda: executor.submit(noop, 1).result(), count=1_000),
            **many("loky map", lambda values: list(executor.map(noop, values))),
            **many("loky map, chunks of 50", lambda values: list(executor.map(noop, values, chunksize=50))),
            **bulk("loky submit", lambda array: executor.submit(size_of, array).result()),
        }
    finally:
        executor.shutdown(kill_workers=True)


def measure_execnet() -> Figures:
    """An echo on a channel: no function travels, so it does less than a call."""
    import execnet

    group = execnet.Group()
    gateway = group.makegateway(f"popen//python={sys.executable}")
    try:
        channel = gateway.remote_exec("while 1: channel.send(channel.receive())")

        def echo() -> object:
            channel.send(1)
            return channel.receive()

        return calls("execnet echo", echo, count=1_000)
    finally:
        group.terminate(timeout=5)


PEERS = {
    "execnet": measure_execnet,
    "loky": measure_loky,
    "ipyparallel": measure_ipyparallel,
    "dask": measure_dask,
    "ray": measure_ray,
}

if __name__ == "__main__":
    # the functions of timing.py and this file are importable by every worker
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    started = time.perf_counter()
    figures = PEERS[sys.argv[1]]()
    report({**figures, f"{sys.argv[1]} round": time.perf_counter() - started})
