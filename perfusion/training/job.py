"""One run in a process of its own, so that a crash, a kill or a lack of memory costs that run alone.

What a job leaves in its folder says how it ended: DONE, or ERROR with the reason, or neither if it was stopped. Nothing
else is known of it, so a sweep can be counted by any process, also after a kill.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from perfusion.files import atomic_write_text
from perfusion.training.devices import lease
from perfusion.training.run_folder import RunFolder, read_config

TRAIN = (sys.executable, "-m", "perfusion.train")
_ROOT = Path(__file__).resolve().parents[2]  # what this package was imported from
_POLL = 0.2  # seconds between two looks at a process and its output
_PATIENCE = (3.0, 30.0)  # seconds after which a process that should stop is told, then killed
_TAIL = 20  # lines of output in ERROR


def run_apart(file: Path, command: Sequence[str] = TRAIN, show: bool = True) -> RunFolder:
    """Train the config in `file` in a process of its own and wait for it. Does nothing where that run is finished.

    Two jobs of one folder take turns, and the second finds it finished. The lock is the child's as well: a job whose
    sweep was killed ends by itself, and the same sweep started anew waits for it.

    Args:
        file: a `config.yaml`.
        command: what trains, called with `from=<file>`.
        show: print what the process says, too; it is kept in `output.log` in any case.

    Returns:
        The run's folder: finished, or with an ERROR file.

    Raises:
        ConfigError: `file` holds no config, or the folder is no place for a run.
        KeyboardInterrupt: this process was stopped; the job was stopped, too, and has no ERROR file.
    """
    config = read_config(file)
    folder = RunFolder.of(config)
    folder.check_place()
    folder.path.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock, lease(config) as (environment, leases):
        folder.error.unlink(missing_ok=True)
        if folder.finished and not config.run.overwrite:  # an attempt to replace it may have failed
            return folder
        process = begun([*command, f"from={file}"], folder.log, environment, [lock, *leases])
        status = _wait(process, folder.log, show)
        if status != 0 or not folder.finished:
            atomic_write_text(folder.error, reason(status, folder.log) + "\n")
    return folder


def begun(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, descriptors: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """A process that runs this package's code and says all that it says into a file.

    Args:
        environment: variables that it has besides those of this process.
        descriptors: of files that it inherits.
    """
    search = os.pathsep.join(part for part in (str(_ROOT), os.environ.get("PYTHONPATH")) if part)
    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )


def error_of(folder: RunFolder) -> str | None:
    """The first line of ERROR: why the last attempt at this run ended; None if it did not fail."""
    try:
        return folder.error.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None


@contextmanager
def _locked(folder: RunFolder) -> Iterator[int]:
    """Hold the folder against other jobs; gives the lock's descriptor."""
    with open(folder.path / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder.path}: another process is training this, waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _wait(process: subprocess.Popen[bytes], log: Path, show: bool) -> int:
    """The process's exit status; what it writes is printed meanwhile."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    with open(log, "rb") as output:

        def copy() -> None:
            new = decode(output.read())
            if show and new:
                sys.stdout.write(new)
                sys.stdout.flush()

        try:
            while process.poll() is None:
                copy()
                try:
                    process.wait(_POLL)
                except subprocess.TimeoutExpired:
                    continue
            return process.returncode
        except BaseException:
            stop(process, *_PATIENCE)  # after Ctrl-C it is on its way out already: the terminal tells all processes
            raise
        finally:
            copy()


def stop(process: subprocess.Popen[bytes], told: float, killed: float) -> None:
    """Have a process end; returns when it has. It is told to after some seconds, and killed some seconds later."""
    for patience, then in ((told, process.terminate), (killed, process.kill)):
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            then()
    process.wait()


def reason(status: int, log: Path) -> str:
    """Why a training with this exit status did not finish, by its output: one line, then the end of what it said."""
    text = log.read_bytes().decode("utf-8", "replace").replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if status < 0:
        first = f"killed by {signal.Signals(-status).name}"
        first += " (out of memory?)" if -status == signal.SIGKILL else ""
    elif status == 0:
        first = "ended without a result"
    else:
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
        first = said[-1] if said else f"exit status {status}, without a word"
    return "\n".join([first, "", *lines[-_TAIL:]])
