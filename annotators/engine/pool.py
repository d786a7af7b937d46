"""Pure functions over many jobs in processes: progress, interrupts, and workers that never outlive the run.

A worker that dies (out of memory, killed) costs the job that it held, which is given to a new worker once more; a job
that kills two workers is left out, and named when all others are done.
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

Beat = Callable[[], None]
"""Called by a job after each picture: counts it, and raises `Stopped` when the run is to end."""
Function = Callable[[Any, Beat], Any]

LIVES = 2
"""Workers that one job may cost."""


class Stopped(Exception):
    """The run was interrupted; the job ends here and its unit is done again next time."""


def run_jobs(
    function: Function,
    jobs: Sequence[Any],
    workers: int,
    progress: Callable[[int], None],
    resume: str,
    name: Callable[[Any], str] = str,
) -> list[Any]:
    """`function(job, beat)` of every job, in the jobs' order; with one worker in this process.

    progress(n): pictures done so far, some times a second. resume: how to go on, said when interrupted. name: what a
    job is called in messages. Raises `Interrupted` after SIGINT or SIGTERM, whatever `SctoolError` a job raises, and
    `SctoolError` naming the jobs that killed their workers, after all others are done.
    """
    with Stop() as asked:
        try:
            if workers <= 1 or not jobs:
                return _run_here(function, jobs, progress, asked)
            return _Pool(function, jobs, min(workers, len(jobs)), progress, asked).run(name)
        except Stopped:
            raise interrupted(asked.signal, resume) from None


def interrupted(number: int, resume: str) -> Interrupted:
    """What a run that was stopped by signal `number` raises."""
    word = "interrupted" if number == signal.SIGINT else "terminated"
    return Interrupted(f"{word}; what is finished is kept. {resume}", number)


def single_threaded() -> None:
    """One thread for OpenCV and torch, so that cores are shared by processes and results are the same in any number."""
    cv2.setNumThreads(1)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # for a torch that is not imported yet


def gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes; asks no library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


# ----------------------------------------------------------------------------------------------- in this process


def _run_here(function: Function, jobs: Sequence[Any], progress: Callable[[int], None], asked: Stop) -> list[Any]:
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


# ------------------------------------------------------------------------------------------------- in processes


def _serve(connection: Connection, number: int, done: Any, stop: Any) -> None:
    """A worker: jobs in, (kind, result) out; no reaction to the terminal's Ctrl-C, and death with the parent."""
    single_threaded()
    if len(found := gpus()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = found[number % len(found)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:  # a killed parent must not leave workers that write beside the next run
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

    def beat() -> None:
        with done.get_lock():
            done.value += 1
        if stop.value:
            raise Stopped

    while True:
        task = connection.recv()
        if task is None:
            return
        function, job = task
        try:
            answer = "done", function(job, beat)
        except Stopped:
            answer = "stopped", None
        except Exception as error:
            error.add_note("in a worker process")
            answer = "failed", error
        connection.send(answer)


class _Worker:
    """One process and the pipe to it; `job` is the number of the job that it holds."""

    def __init__(self, context: Any, number: int, done: Any, stop: Any) -> None:
        self.number, self.job = number, None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, number, done, stop), daemon=True)
        self.process.start()
        theirs.close()  # or a dead worker's pipe would never end

    job: int | None


class _Pool:
    """Workers, jobs that wait, and results."""

    def __init__(
        self, function: Function, jobs: Sequence[Any], workers: int, progress: Callable[[int], None], asked: Stop
    ) -> None:
        self.context = multiprocessing.get_context("spawn")  # the caller may hold threads, which a fork would break
        self.done, self.stop = self.context.Value(ctypes.c_int64), self.context.Value(ctypes.c_int8, lock=False)
        self.function, self.jobs, self.progress, self.asked = function, jobs, progress, asked
        self.waiting, self.deaths = deque(range(len(jobs))), Counter[int]()
        self.results: list[Any] = [None] * len(jobs)
        self.lost: list[int] = []
        self.workers = [self._hire(number) for number in range(workers)]

    def _hire(self, number: int) -> _Worker:
        return _Worker(self.context, number, self.done, self.stop)

    def run(self, name: Callable[[Any], str]) -> list[Any]:
        """All results, in order."""
        try:
            for worker in self.workers:
                self._give(worker)
            while busy := {worker.pipe: worker for worker in self.workers if worker.job is not None}:
                for pipe in wait(list(busy), timeout=0.1):
                    assert isinstance(pipe, Connection)
                    self._take(busy[pipe], name)
                self.progress(self.done.value)
                if self.asked.signal:
                    raise Stopped
        finally:
            self._dismiss()
        if self.lost:
            names = ", ".join(name(self.jobs[i]) for i in self.lost)
            raise SctoolError(
                f"worker processes died at {names}, {LIVES} at each, probably for want of memory. Everything else is "
                "finished and kept: run the same command again, with fewer --jobs."
            )
        return self.results

    def _give(self, worker: _Worker) -> None:
        worker.job = self.waiting.popleft() if self.waiting else None
        if worker.job is not None:
            with suppress(OSError):  # it died while idle; `_take` finds its pipe at an end
                worker.pipe.send((self.function, self.jobs[worker.job]))

    def _take(self, worker: _Worker, name: Callable[[Any], str]) -> None:
        """What a worker answers, or its death."""
        assert worker.job is not None
        try:
            kind, result = worker.pipe.recv()
        except (EOFError, OSError):
            assert worker.job is not None
            print(f"a worker process died at {name(self.jobs[worker.job])}", file=sys.stderr)
            self._bury(worker)
            return
        if kind == "stopped":
            raise Stopped
        if kind == "failed":
            raise result
        self.results[worker.job] = result
        self._give(worker)

    def _bury(self, worker: _Worker) -> None:
        job = worker.job
        assert job is not None
        self.deaths[job] += 1
        if self.deaths[job] < LIVES:
            self.waiting.appendleft(job)
        else:
            self.lost.append(job)
        worker.process.join()
        fresh = self.workers[self.workers.index(worker)] = self._hire(worker.number)
        self._give(fresh)

    def _dismiss(self) -> None:
        """Ends all workers; those inside a job stop after their picture."""
        self.stop.value = 1
        for worker in self.workers:
            with suppress(OSError):
                worker.pipe.send(None)
        for worker in self.workers:
            while worker.process.is_alive():
                with suppress(EOFError, OSError):
                    if worker.pipe.poll(0.05):
                        worker.pipe.recv()  # an answer nobody waits for must not fill the pipe
            worker.process.join()
