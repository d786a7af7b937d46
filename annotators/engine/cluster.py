"""Jobs as tasks of a Ray cluster, whose nodes share the folders that are read and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...core.errors import SctoolError, UsageError
from ...core.signals import Stop
from .pool import MAX_ATTEMPTS, JobFunction, interrupted, single_threaded


def _task(function: JobFunction, job: Any) -> Any:
    single_threaded()
    return function(job, lambda: None)


def run_on_ray(
    function: JobFunction,
    jobs: Sequence[Any],
    address: str,
    workers: int | None,
    progress: Callable[[int], None],
    job_name: Callable[[Any], str],
    *,
    gpu: bool = False,
) -> list[Any]:
    """The results of `function(job, on_image)` for all jobs, in order: one Ray task per job, a dict of counts each.

    address: of a cluster, `auto` for the one that this machine belongs to, `local` to start one here. workers: number
    of tasks at a time; as many as the cluster can run when None. gpu: a task uses a GPU if there are any.
    A task whose worker dies is run once more. Raises the errors of `pool.run_jobs`, and `UsageError` if Ray is not
    installed or cannot be reached.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("--ray needs the package ray. Install it: pip install 'sctool[ray]'") from error
    try:
        options = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {"address": address}
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray {address}: no cluster answers ({str(error).splitlines()[0]}).") from error
    try:
        resources = ray.cluster_resources()
        gpus = 1 if gpu and resources.get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=MAX_ATTEMPTS - 1)(_task)
        slots = workers or max(1, int(resources.get("GPU" if gpus else "CPU", 1)))
        return _run(ray, task, function, jobs, slots, progress, job_name)
    finally:
        ray.shutdown()


def _run(
    ray: Any,
    task: Any,
    function: JobFunction,
    jobs: Sequence[Any],
    slots: int,
    progress: Callable[[int], None],
    job_name: Callable[[Any], str],
) -> list[Any]:
    results: list[Any] = [None] * len(jobs)
    lost: list[int] = []
    running: dict[Any, int] = {}
    waiting = iter(range(len(jobs)))
    done = 0
    with Stop() as stop:
        while True:
            while len(running) < slots and (number := next(waiting, None)) is not None:
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
                except ray.exceptions.RayError:  # the worker or its node died, or ran out of memory
                    lost.append(number)
            progress(done)
            if stop.signal:
                for reference in running:
                    ray.cancel(reference)
                raise interrupted(stop.signal)
    if lost:
        names = ", ".join(job_name(jobs[number]) for number in lost)
        raise SctoolError(
            f"Ray lost the workers of {names}, {MAX_ATTEMPTS} at each, probably for lack of memory. Everything else is "
            "finished: run the same command again."
        )
    return results
