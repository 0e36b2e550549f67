"""Several processes at one run: who one is, a common start, who is still alive.

They share nothing but a folder of files. Launchers (`torchrun`, `accelerate launch`, MPI's) say who one is in the
environment; else a process is alone, and nothing of torch.distributed is imported.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO

NAMES = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
MEET = timedelta(hours=1)  # how far apart the processes may be in reading the model


@dataclass
class Group:
    """This process, number `rank` of `size`. Number 0 prepares, and finishes what all have done."""

    rank: int = 0
    size: int = 1
    _held: list[IO[bytes]] = field(default_factory=list, repr=False)

    @classmethod
    def here(cls) -> "Group":
        """What the launcher says. Raises ValueError for numbers that do not fit."""
        names = next((pair for pair in NAMES if pair[1] in os.environ), None)
        if names is None:
            return cls()
        rank, size = (os.environ.get(name, "") for name in names)
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise ValueError(f"{names[0]} must be a number below {names[1]}, got {rank!r} and {size!r}")
        return cls(int(rank), int(size))

    @property
    def main(self) -> bool:
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process: with "auto" and several GPUs each has its own."""
        if asked != "auto" or self.size == 1:
            return asked
        import torch

        if not torch.cuda.is_available():
            return asked
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def begin(self, folder: Path, prepare: Callable[[], None]) -> None:
        """Process 0 prepares the folder, the others wait for that. From then on each is known to be alive in it.

        Raises what `prepare` raises; in the other processes, and if one is gone before all have met, ValueError.
        """
        problem: BaseException | None = None
        with self._meeting():
            if self.main:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    self._hold(folder)
                    prepare()
                except BaseException as error:  # the others must hear of it
                    problem = error
            good = self._told(problem is None)
            if good and not self.main:
                self._hold(folder)
            if good and self.size > 1:
                from torch import distributed

                distributed.barrier()
        if problem is not None:
            raise problem
        if not good:
            raise ValueError("process 0 did not begin; it says why")

    def others_gone(self, folder: Path) -> list[int]:
        """Numbers of the other processes that ended."""
        return [r for r in range(self.size) if r != self.rank and not _is_held(_lock(folder, r))]

    def end(self) -> None:
        """No longer at work."""
        while self._held:
            self._held.pop().close()

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """All processes connected, if there are several."""
        if self.size == 1:
            yield
            return
        from torch import distributed

        try:
            distributed.init_process_group("gloo", rank=self.rank, world_size=self.size, timeout=MEET)
            yield
        except RuntimeError as error:
            raise ValueError(f"process {self.rank} of {self.size} did not meet the others: {error}") from error
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()

    def _told(self, good: bool) -> bool:
        """The word of process 0, to all of them: a plain tensor (objects would travel as pickles)."""
        if self.size == 1:
            return good
        import torch
        from torch import distributed

        word = torch.tensor([good])
        distributed.broadcast(word, 0)
        return bool(word)

    def _hold(self, folder: Path) -> None:
        """Lock this process's file: the system lets go of it when the process ends, however that comes about."""
        file = open(_lock(folder, self.rank), "ab")
        try:
            if not _locked(file):
                raise ValueError(f"another run is at work in {str(folder)!r}: wait for it or stop it")
        except BaseException:
            file.close()
            raise
        self._held.append(file)


def _lock(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank}.lock"


def _locked(file: IO[bytes]) -> bool:
    """Lock a file; False if someone else has. Systems without such locks let everyone pass."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def _is_held(path: Path) -> bool:
    try:
        import fcntl

        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, OSError):  # held, or no telling
        return True
    return False
