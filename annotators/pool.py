"""Pure functions over many jobs in processes: progress, interrupts, and workers that never outlive the run."""

from __future__ import annotations

import concurrent.futures as futures
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cv2

from ..core.errors import Interrupted, SctoolError
from ..core.signals import Stop

Beat = Callable[[], None]
"""Called by a job after each picture: counts it, and raises `Stopped` when the run is to end."""


class Stopped(Exception):
    """The run was interrupted; the job ends here and its unit is done again next time."""


_shared: dict[str, Any] = {}


def _start_worker(done: Any, stop: Any) -> None:
    """One thread a process, no reaction to the terminal's Ctrl-C, and death with the parent."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _shared.update(done=done, stop=stop)
    parent = multiprocessing.parent_process()

    def follow() -> None:  # a killed parent must not leave workers that write beside the next run
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _beat() -> None:
    with _shared["done"].get_lock():
        _shared["done"].value += 1
    if _shared["stop"].value:
        raise Stopped


def _work(function: Callable[[Any, Beat], Any], job: Any) -> Any:
    return function(job, _beat)


def run_jobs(
    function: Callable[[Any, Beat], Any],
    jobs: Sequence[Any],
    workers: int,
    progress: Callable[[int], None],
    resume: str,
) -> list[Any]:
    """`function(job, beat)` of every job, in the jobs' order; with one worker in this process.

    progress(n): pictures done so far, some times a second. resume: how to go on, said when interrupted.
    Raises `Interrupted` after SIGINT or SIGTERM, and whatever `SctoolError` a job raises.
    """
    with Stop() as asked:
        try:
            if workers <= 1 or not jobs:
                return _run_here(function, jobs, progress, asked)
            return _run_processes(function, jobs, workers, progress, asked)
        except Stopped:
            word = "interrupted" if asked.signal == signal.SIGINT else "terminated"
            raise Interrupted(f"{word}; what is finished is kept. {resume}", asked.signal) from None


def _run_here(function: Any, jobs: Sequence[Any], progress: Callable[[int], None], asked: Stop) -> list[Any]:
    done, shown, threads = 0, 0.0, cv2.getNumThreads()

    def beat() -> None:
        nonlocal done, shown
        done += 1
        if time.monotonic() - shown > 0.1:
            shown = time.monotonic()
            progress(done)
        if asked.signal:
            raise Stopped

    cv2.setNumThreads(1)
    try:
        results = [function(job, beat) for job in jobs]
    finally:
        cv2.setNumThreads(threads)
    progress(done)
    if asked.signal:
        raise Stopped
    return results


def _run_processes(
    function: Any, jobs: Sequence[Any], workers: int, progress: Callable[[int], None], asked: Stop
) -> list[Any]:
    context = multiprocessing.get_context("spawn")  # the caller may hold threads, which a fork would break
    done, stop = context.Value(ctypes.c_int64), context.Value(ctypes.c_int8, lock=False)
    pool = futures.ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (done, stop))
    try:
        started = [pool.submit(_work, function, job) for job in jobs]
        pending = set(started)
        while pending:
            finished, pending = futures.wait(pending, timeout=0.1, return_when=futures.FIRST_COMPLETED)
            progress(done.value)
            for future in finished:
                future.result()
            if asked.signal:
                raise Stopped
        return [future.result() for future in started]
    except BrokenProcessPool as error:
        raise SctoolError(
            "a worker process died, probably for want of memory. What is finished is kept: "
            "run the same command again, with fewer --jobs."
        ) from error
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)
