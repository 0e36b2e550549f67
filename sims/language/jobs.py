"""Many independent computations: in several processes, each stored when done, none computed twice."""

import copy
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sims.files import write_atomically
from theory import SolverError, __version__
from theory._check import check_count


def run_jobs(
    function: Callable[..., Any],
    jobs: Sequence[dict[str, Any]],
    folder: str | Path | None = None,
    workers: int | None = None,
    label: str = "",
    *,
    version: str = __version__,
) -> list[Any]:
    """`[function(**job) for job in jobs]`, in several processes, resumable.

    Parameters
    ----------
    function : a top-level function that returns JSON values (arrays become lists, tuples too, infinities stay).
        It should draw its random numbers from a seed in the job: then the result is the same for any `workers`.
    jobs : its arguments, JSON values; equal ones are computed once.
    folder : where every finished job is stored at once and looked up first; None stores nothing.
    workers : processes (default: one per core), each on one thread of torch; 1 computes in this process.
    label : of the progress bar.
    version : what the stored results depend on beside function and job; with another one everything is computed anew.

    Raises ValueError for a function that has no name at the top of a module, a job that is no JSON, a stored result
    that is damaged; what a job raises, with a note that names the job; SolverError if a process was killed. Jobs that
    had finished by then are stored; after an interrupt no process stays behind.
    """
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '<none>')}"
    if "<" in name:
        raise ValueError(f"function must be at the top of a module, got {function!r}")
    workers = check_count(_cores() if workers is None else workers, "workers")
    titles = [_title(name, job, version) for job in jobs]
    path = None if folder is None else _check_folder(Path(folder))
    pending = dict(zip(titles, jobs, strict=True))
    done = {} if path is None else {t: _stored(_file(path, t), t) for t in pending if _file(path, t).is_file()}
    pending = {t: json.loads(t)["job"] for t in pending if t not in done}
    with tqdm(total=len(pending) + len(done), initial=len(done), desc=label or function.__name__, disable=None) as bar:
        for title, result in _computed(function, pending, min(workers, len(pending))):
            text = json.dumps({**json.loads(title), "result": result}, indent=1, default=_plain)
            if path is not None:
                write_atomically(_file(path, title), text + "\n")
            done[title] = json.loads(text)["result"]  # the same value as when it is read back later
            bar.update()
    return [copy.deepcopy(done[t]) for t in titles]  # equal jobs do not share a result


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _title(function: str, job: dict[str, Any], version: str) -> str:
    """What identifies a result, as JSON."""
    try:
        return json.dumps({"function": function, "version": version, "job": job}, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a job must hold JSON values only, got {job!r} ({error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a job must return JSON values, got a {type(value).__name__}")


def _check_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder, got the file {str(folder)!r}")
    return folder


def _file(folder: Path, title: str) -> Path:
    name = json.loads(title)["function"].rpartition(".")[2]
    return folder / f"{name}-{hashlib.sha256(title.encode()).hexdigest()[:20]}.json"


def _stored(file: Path, title: str) -> Any:
    try:
        found = json.loads(file.read_bytes())
        result = found.pop("result")
        if json.dumps(found, sort_keys=True) != title:
            raise ValueError("it belongs to another job")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"stored result {str(file)!r} is damaged ({error}): delete it to compute it again") from error
    return result


def _computed(function: Callable[..., Any], jobs: dict[str, Any], workers: int) -> Iterator[tuple[str, Any]]:
    """(title, result) of every job, as they finish."""
    if workers <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for title, job in jobs.items():
                yield title, _called(function, job)
        finally:
            torch.set_num_threads(threads)
        return
    others = set(active_children())
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker) as pool:
        try:
            titles = {pool.submit(_called, function, job): title for title, job in jobs.items()}
            for future in as_completed(titles):
                yield titles[future], future.result()
        except BrokenProcessPool as error:
            raise SolverError("a worker process was killed (out of memory?): try fewer workers") from error
        except BaseException:  # an interrupt, or a job that raised: the rest is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()
            raise


def _called(function: Callable[..., Any], job: dict[str, Any]) -> Any:
    try:
        return function(**job)
    except Exception as error:
        error.add_note(f"in the job {job}")
        raise


def _start_worker() -> None:
    """One thread; an interrupt is the parent's to handle; a worker never outlives its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
