"""A function over many jobs in processes: progress, interrupts, and workers that never outlive the run.

If a worker dies (out of memory, killed), its job is given to a new worker once more. A job that kills two workers is
left out, and named when all others are done.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cv2

from ...core.errors import Interrupted, SctoolError
from ...core.signals import Stop

OnImage = Callable[[], None]
"""Called by a job after each image: counts it, and raises `Stopped` when the run is to end."""
JobFunction = Callable[[Any, OnImage], Any]
RESUME = "Run the same command again to continue."

MAX_ATTEMPTS = 2
"""How often a job is started before it is left out."""


class Stopped(Exception):
    """The run was interrupted; the job ends here and is done again next time."""


def run_jobs(
    function: JobFunction,
    jobs: Sequence[Any],
    workers: int,
    progress: Callable[[int], None],
    job_name: Callable[[Any], str] = str,
) -> list[Any]:
    """The results of `function(job, on_image)` for all jobs, in order. One worker means: in this process.

    progress: called a few times per second with the number of images done. job_name: the name of a job in messages.
    Raises `Interrupted` after SIGINT or SIGTERM, any `SctoolError` of a job, and, after all other jobs are done,
    `SctoolError` naming the jobs that killed their workers.
    """
    with Stop() as stop:
        try:
            if workers <= 1 or not jobs:
                return _run_in_this_process(function, jobs, progress, stop)
            return _Pool(function, jobs, min(workers, len(jobs)), progress, stop).run(job_name)
        except Stopped:
            raise interrupted(stop.signal) from None


def interrupted(number: int) -> Interrupted:
    """The error of a run that signal `number` stopped."""
    word = "interrupted" if number == signal.SIGINT else "terminated"
    return Interrupted(f"{word}; finished work is kept. {RESUME}", number)


def single_threaded() -> None:
    """Limits OpenCV and torch to one thread: processes share the cores, and results do not depend on their number."""
    cv2.setNumThreads(1)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # read by torch when it is imported


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Loads no library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


# ----------------------------------------------------------------------------------------------- in this process


def _run_in_this_process(
    function: JobFunction, jobs: Sequence[Any], progress: Callable[[int], None], stop: Stop
) -> list[Any]:
    done, reported, threads = 0, 0.0, cv2.getNumThreads()

    def on_image() -> None:
        nonlocal done, reported
        done += 1
        if time.monotonic() - reported > 0.1:
            reported = time.monotonic()
            progress(done)
        if stop.signal:
            raise Stopped

    cv2.setNumThreads(1)
    try:
        results = [function(job, on_image) for job in jobs]
    finally:
        cv2.setNumThreads(threads)
    progress(done)
    if stop.signal:
        raise Stopped
    return results


# ------------------------------------------------------------------------------------------------- in processes


def _work(connection: Connection, number: int, done: Any, stopping: Any) -> None:
    """A worker's loop: receives jobs, sends (kind, result). Ignores Ctrl-C and ends when the parent process does."""
    single_threaded()
    if len(devices := gpus()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def exit_with_parent() -> None:  # workers of a killed run must not write while the next run does
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()

    def on_image() -> None:
        with done.get_lock():
            done.value += 1
        if stopping.value:
            raise Stopped

    while True:
        message = connection.recv()
        if message is None:
            return
        function, job = message
        try:
            answer = "done", function(job, on_image)
        except Stopped:
            answer = "stopped", None
        except Exception as error:
            error.add_note("in a worker process")
            answer = "failed", error
        connection.send(answer)


class _Worker:
    """One process and the pipe to it; `job` is the number of its current job."""

    def __init__(self, context: Any, number: int, done: Any, stopping: Any) -> None:
        self.number, self.job = number, None
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_work, args=(child_end, number, done, stopping), daemon=True)
        self.process.start()
        child_end.close()  # or the pipe of a dead worker would never report its end

    job: int | None


class _Pool:
    """Workers, waiting jobs, and results."""

    def __init__(
        self, function: JobFunction, jobs: Sequence[Any], workers: int, progress: Callable[[int], None], stop: Stop
    ) -> None:
        self.context = multiprocessing.get_context("spawn")  # the caller may have threads, which a fork would break
        self.done, self.stopping = self.context.Value(ctypes.c_int64), self.context.Value(ctypes.c_int8, lock=False)
        self.function, self.jobs, self.progress, self.stop = function, jobs, progress, stop
        self.waiting, self.attempts = deque(range(len(jobs))), Counter[int]()
        self.results: list[Any] = [None] * len(jobs)
        self.lost: list[int] = []
        self.workers = [self._start_worker(number) for number in range(workers)]

    def _start_worker(self, number: int) -> _Worker:
        return _Worker(self.context, number, self.done, self.stopping)

    def run(self, job_name: Callable[[Any], str]) -> list[Any]:
        """All results, in order."""
        try:
            for worker in self.workers:
                self._assign(worker)
            while busy := {worker.pipe: worker for worker in self.workers if worker.job is not None}:
                for pipe in wait(list(busy), timeout=0.1):
                    assert isinstance(pipe, Connection)
                    self._receive(busy[pipe], job_name)
                self.progress(self.done.value)
                if self.stop.signal:
                    raise Stopped
        finally:
            self._end_workers()
        if self.lost:
            names = ", ".join(job_name(self.jobs[i]) for i in self.lost)
            raise SctoolError(
                f"worker processes died at {names}, {MAX_ATTEMPTS} at each, probably for lack of memory. Everything "
                "else is finished: run the same command again with fewer --jobs."
            )
        return self.results

    def _assign(self, worker: _Worker) -> None:
        worker.job = self.waiting.popleft() if self.waiting else None
        if worker.job is not None:
            with suppress(OSError):  # it died while idle; `_receive` will notice
                worker.pipe.send((self.function, self.jobs[worker.job]))

    def _receive(self, worker: _Worker, job_name: Callable[[Any], str]) -> None:
        """Handles a worker's answer, or its death."""
        assert worker.job is not None
        try:
            kind, result = worker.pipe.recv()
        except (EOFError, OSError):
            print(f"a worker process died at {job_name(self.jobs[worker.job])}", file=sys.stderr)
            self._replace(worker, worker.job)
            return
        if kind == "stopped":
            raise Stopped
        if kind == "failed":
            raise result
        self.results[worker.job] = result
        self._assign(worker)

    def _replace(self, worker: _Worker, job: int) -> None:
        self.attempts[job] += 1
        if self.attempts[job] < MAX_ATTEMPTS:
            self.waiting.appendleft(job)
        else:
            self.lost.append(job)
        worker.process.join()
        successor = self.workers[self.workers.index(worker)] = self._start_worker(worker.number)
        self._assign(successor)

    def _end_workers(self) -> None:
        """Ends all workers; a busy one stops after its current image."""
        self.stopping.value = 1
        for worker in self.workers:
            with suppress(OSError):
                worker.pipe.send(None)
        for worker in self.workers:
            while worker.process.is_alive():
                with suppress(EOFError, OSError):
                    if worker.pipe.poll(0.05):
                        worker.pipe.recv()  # an unread answer must not block the worker
            worker.process.join()
