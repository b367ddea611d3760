"""Processes of their own for tests, forked from a server that has imported the kit once: started in 0.1 s.

    printed = warm.run("dispersive-kit", "train", ..., processes=2)    # a command, on processes as torchrun starts them
    printed = warm.run(Path(__file__).with_name("worker.py"), ...)     # or a script

A real interpreter takes some seconds of CPU to import PyTorch, and each test would pay them again for every process.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torch.distributed import TCPStore

from dispersive_kit.cli import main

_PRELOADED = [
    "torch.distributed.fsdp",
    "torchvision",
    "accelerate",
    "sklearn.datasets",
    "dispersive_kit.training",
    "warm",
]


class Started:
    """One command on one or several processes."""

    def __init__(self, arguments: tuple[object, ...], processes: int, env: dict[str, str]) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (as long as this object)
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(_PRELOADED)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, as the server starts
        places = [{}]
        if processes > 1:  # as torchrun does it: the store is there before its port is given to anyone
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port, "WORLD_SIZE": processes}
            place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
            place |= {"LOCAL_WORLD_SIZE": processes}
            places = [{**place, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
        words = list(map(str, arguments))
        inherited = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        self.processes = [
            forks.Process(target=_child, args=(words, inherited | place, self._log.name, Path.cwd()))
            for place in ({name: str(value) for name, value in one.items()} for one in places)
        ]
        for process in self.processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def pid(self) -> int:
        return self.pids[0]

    @property
    def output(self) -> str:
        return Path(self._log.name).read_text()

    def poll(self) -> int | None:
        """The first status that is not 0 once all have ended; one that fails ends the others, as with a launcher."""
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            for process in self.processes:
                process.join(5)  # a signal reaches all of them, and each ends in its own time
                process.kill()
                process.join()
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = end - time.monotonic()
            if left < 0:
                self.kill()
                raise TimeoutError(f"not ended after {timeout} s:\n{self.output}")
            multiprocessing.connection.wait([p.sentinel for p in self.processes if p.exitcode is None], min(left, 1))
        return code

    def until(self, done: Callable[[], object], timeout: float = 400) -> None:
        """Wait while it runs until `done()` holds; fails with what it printed if it ends first, or after the time."""
        end = time.monotonic() + timeout
        while not done():
            assert self.poll() is None and time.monotonic() < end, self.output
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.join()


def start(*arguments: object, processes: int = 1, **env: str) -> Started:
    """Start a command of the kit ("dispersive-kit", ...) or a script (its path, ...) on so many processes."""
    return Started(arguments, processes, env)


def run(*arguments: object, processes: int = 1, timeout: float = 300, **env: str) -> str:
    """Start it, wait for its end, return what it printed; fails with that if it fails."""
    started = start(*arguments, processes=processes, **env)
    assert started.wait(timeout) == 0, started.output
    return started.output


def _child(arguments: list[str], env: dict[str, str], log: str, folder: Path) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = arguments
    if arguments[0] == "dispersive-kit":
        main()
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
