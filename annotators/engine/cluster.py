"""The same pure functions over many jobs as tasks of a Ray cluster, whose nodes share the folders read and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...core.errors import SctoolError, UsageError
from ...core.signals import Stop
from .pool import LIVES, Function, interrupted, single_threaded


def _task(function: Function, job: Any) -> Any:
    single_threaded()
    return function(job, lambda: None)


def run_ray(
    function: Function,
    jobs: Sequence[Any],
    address: str,
    workers: int | None,
    progress: Callable[[int], None],
    resume: str,
    name: Callable[[Any], str],
    *,
    gpu: bool = False,
) -> list[Any]:
    """`function(job, beat)` of every job as a Ray task a job; results in order, each a dict of counts by kind.

    address: a cluster's, `auto` for the one that this machine is part of, `local` for one started here. workers: how
    many tasks run at a time; all that the cluster has room for when None. gpu: a task takes a GPU where there are any.
    A task whose worker dies is run once more. Raises as `pool.run_jobs` does, and `UsageError` where Ray is missing or
    cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs the package ray. Install it: pip install 'sctool[ray]'") from error
    try:
        here = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {"address": address}
        ray.init(**here, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray {address}: no cluster answers ({str(error).splitlines()[0]}).") from error
    try:
        resources = ray.cluster_resources()
        gpus = 1 if gpu and resources.get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=LIVES - 1)(_task)
        room = workers or max(1, int(resources.get("GPU" if gpus else "CPU", 1)))
        return _run(ray, task, function, jobs, room, progress, resume, name)
    finally:
        ray.shutdown()


def _run(
    ray: Any,
    task: Any,
    function: Function,
    jobs: Sequence[Any],
    room: int,
    progress: Callable[[int], None],
    resume: str,
    name: Callable[[Any], str],
) -> list[Any]:
    results: list[Any] = [None] * len(jobs)
    lost: list[int] = []
    running: dict[Any, int] = {}
    waiting = iter(range(len(jobs)))
    done = 0
    with Stop() as asked:
        while True:
            while len(running) < room and (number := next(waiting, None)) is not None:
                running[task.remote(function, jobs[number])] = number
            if not running:
                break
            for reference in ray.wait(list(running), timeout=0.2)[0]:
                number = running.pop(reference)
                try:
                    results[number] = ray.get(reference)
                    done += sum(results[number].values())
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, SctoolError) else error from None
                except ray.exceptions.RayError:  # the worker or its node died, or had no memory left
                    lost.append(number)
            progress(done)
            if asked.signal:
                for reference in running:
                    ray.cancel(reference)
                raise interrupted(asked.signal, resume)
    if lost:
        names = ", ".join(name(jobs[number]) for number in lost)
        raise SctoolError(
            f"Ray lost the workers of {names}, {LIVES} at each, probably for want of memory. Everything else is "
            "finished and kept: run the same command again."
        )
    return results
