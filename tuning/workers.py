"""A search in several processes: one that chooses the trials (keras-tuner's chief), and workers that train them.

keras-tuner finds its part in three environment variables. On one machine `run_all` sets them and looks after the processes.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from ortho_keras.method.errors import InputError
from tuning.trials import RUNNING, read_trials

ALONE, CHIEF, WORKER = "alone", "chief", "worker"
ID, ADDRESS, PORT = "KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT"
LAUNCHER, DEADLINE, COUNT = (f"ORTHO_KERAS_SEARCH_{name}" for name in ("LAUNCHER", "DEADLINE", "WORKERS"))
MOST_DEATHS = 5  # of workers while no trial ends; a single trial is given up before
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def role():
    """Returns what this process is in a search: `"alone"`, `"chief"` or `"worker"`.

    Raises:
        InputError: If keras-tuner's variables are not all set, or the port is none.
    """
    given = [name for name in (ID, ADDRESS, PORT) if os.environ.get(name)]
    if not given:
        return ALONE
    if len(given) < 3:
        raise InputError(f"{ID}, {ADDRESS} and {PORT} must be set together, or none. Received: {', '.join(given)} only")
    if not (os.environ[PORT].isdecimal() and 0 < int(os.environ[PORT]) < 65536):
        raise InputError(f"{PORT} must be a port, 1 to 65535. Received: {os.environ[PORT]!r}")
    return CHIEF if "chief" in os.environ[ID] else WORKER


def launched():
    """Returns whether `run_all` started this process."""
    return bool(os.environ.get(LAUNCHER))


def orphaned():
    """Returns whether `run_all` started this process and is gone."""
    return launched() and os.getppid() != int(os.environ[LAUNCHER])


def count():
    """Returns how many trials run at a time, as far as this process knows."""
    return int(os.environ.get(COUNT, 1))


def deadline():
    """Returns the time, in seconds since the epoch, at which `run_all` wants an end, or `None`."""
    return float(os.environ[DEADLINE]) if os.environ.get(DEADLINE) else None


@contextlib.contextmanager
def watched_chief(deadline):
    """Ends a chief, which would wait for its workers for ever, soon after the deadline or with the process that started it.

    Raises:
        InputError: If the chief cannot listen at its address.
    """

    def check(*_):
        if (deadline and time.time() > deadline + 60) or orphaned():
            sys.exit(0)  # its files are whole at any time

    signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    except RuntimeError as error:
        if "bind" not in str(error):
            raise
        address = f"{os.environ[ADDRESS]}:{os.environ[PORT]}"
        raise InputError(
            f"{ADDRESS} and {PORT} must be an address of this machine that is free. Received: {address}"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_all(workers, deadline, directory):
    """Runs this very command as a chief and so many workers on this machine, until the search is over.

    A worker that is killed is started again under its name: the chief gives it its trial again, which goes on from its
    checkpoint. SIGINT and SIGTERM are handed on.

    Returns:
        The status of the search, an int: 0, or that of a process that refused.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {ADDRESS: "127.0.0.1", PORT: str(port), COUNT: str(workers), DEADLINE: str(deadline or "")}
    common[LAUNCHER] = str(os.getpid())
    command = [sys.executable, "-m", "tuning.search", *sys.argv[1:], "--workers=0"]

    def start(name):
        return subprocess.Popen(command, env={**os.environ, **common, ID: name})

    asked = []
    before = {signum: signal.signal(signum, lambda signum, _: asked.append(signum)) for signum in STOP_SIGNALS}
    processes = {}
    try:
        processes = {name: start(name) for name in (CHIEF, *(f"worker{index}" for index in range(workers)))}
        return _look_after(processes, start, asked, directory)
    finally:
        for stop in (subprocess.Popen.terminate, subprocess.Popen.wait):
            for process in processes.values():
                stop(process)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _look_after(processes, start, asked, directory):
    """Waits until the workers have ended, and starts those again that were killed; returns the search's status."""
    deaths, ended = 0, 0
    while any(name != CHIEF for name in processes):
        time.sleep(0.2)
        if asked:
            return 128 + asked[0]
        codes = {name: process.poll() for name, process in processes.items()}
        for name in (name for name, code in codes.items() if code is not None):
            code = codes[name]
            if code == 0:
                del processes[name]  # a chief that is done is gone before the last worker
            elif name != CHIEF and (code < 0 or code > 128):
                now = sum(trial.state != RUNNING for trial in read_trials(directory))
                deaths, ended = (deaths + 1 if now == ended else 1), now
                if deaths > MOST_DEATHS:
                    print(f"tuning.search: workers were ended {deaths} times and no trial did", file=sys.stderr)
                    return 1
                told = f"signal {-code}" if code < 0 else f"status {code}"
                print(f"{name} was ended by {told}; it is started again and goes on with its trial", flush=True)
                processes[name] = start(name)
            else:
                if code < 0:
                    print(f"tuning.search: the {name} was ended by signal {-code}; the same command goes on", file=sys.stderr)
                return max(code, 1)
    return 0
