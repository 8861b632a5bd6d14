"""A search in several processes: keras-tuner's chief, which chooses the trials, and workers, which train them.

keras-tuner reads a process's part from three environment variables. On one machine `run_all` sets them and supervises the
processes.
"""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import grpc

from ortho_keras.method.console import say
from ortho_keras.method.errors import InputError
from tuning.trials import RUNNING, read_trials

ALONE, CHIEF, WORKER = "alone", "chief", "worker"
ID, ADDRESS, PORT = "KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT"
LAUNCHER, DEADLINE, COUNT = (f"ORTHO_KERAS_SEARCH_{name}" for name in ("LAUNCHER", "DEADLINE", "WORKERS"))
PATIENCE = 10  # seconds of waiting without a word
MOST_DEATHS = 5  # of workers while no trial ends
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def role():
    """Returns this process's part in a search: `"alone"`, `"chief"` or `"worker"`.

    Raises:
        InputError: If keras-tuner's variables are not all set, or the port is not valid.
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
    """Returns whether `run_all` started this process and has ended."""
    return launched() and os.getppid() != int(os.environ[LAUNCHER])


def count():
    """Returns the number of trials that run at a time, as far as this process knows."""
    return int(os.environ.get(COUNT, 1))


def deadline():
    """Returns `run_all`'s deadline, in seconds since the epoch, or `None`."""
    return float(os.environ.get(DEADLINE) or 0) or None


def await_chief(log):
    """Waits in a worker until its chief can be reached, for ten seconds; then logs it, and keras-tuner waits for an hour."""
    address = f"{os.environ[ADDRESS]}:{os.environ[PORT]}"
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(PATIENCE)
        except grpc.FutureTimeoutError:
            log(f"{os.environ[ID]} is waiting for the chief at {address}")


@contextlib.contextmanager
def watched_chief(deadline, oracle, log):
    """Ends a chief, which would wait for its workers forever, a minute after the deadline or with its launcher.

    Logs it where no worker has come after ten seconds, unless the launcher starts them.

    Raises:
        InputError: If the chief cannot listen at its address.
    """

    address = f"{os.environ[ADDRESS]}:{os.environ[PORT]}"
    alarms = itertools.count(1)  # one each second

    def check(*_):
        if (deadline and time.time() > deadline + 60) or orphaned():
            sys.exit(0)  # all files are complete at any time
        if next(alarms) == PATIENCE and not oracle.tuner_ids and not launched():
            log(f"the chief at {address} is waiting for workers")

    signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    except RuntimeError as error:
        if "bind" not in str(error):
            raise
        message = f"{ADDRESS} and {PORT} must be a free address of this machine"
        raise InputError(f"{message}. Received: {address}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_all(workers, deadline, directory):
    """Runs this same command as a chief and workers on this machine, until the search is over.

    A worker that was killed is restarted under its name: the chief gives it the same trial, which it resumes. SIGINT and
    SIGTERM are passed on.

    Returns:
        The status of the search, an int: 0, or that of the process that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {ADDRESS: "127.0.0.1", PORT: str(port), COUNT: str(workers), DEADLINE: str(deadline or "")}
    common[LAUNCHER] = str(os.getpid())
    command = [sys.executable, "-m", "tuning.search", *sys.argv[1:], "--workers=0"]

    def start(name):
        return subprocess.Popen(command, env={**os.environ, **common, ID: name})

    received = []
    before = {signum: signal.signal(signum, lambda signum, _: received.append(signum)) for signum in STOP_SIGNALS}
    processes = {}
    try:
        processes |= {name: start(name) for name in (CHIEF, *(f"worker{index}" for index in range(workers)))}
        return _supervise(processes, start, received, directory)
    finally:
        for stop in (subprocess.Popen.terminate, subprocess.Popen.wait):
            for process in processes.values():
                stop(process)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _supervise(processes, start, received, directory):
    """Waits until all workers have ended, and restarts those that were killed; returns the search's status."""
    deaths, ended = 0, 0
    while any(name != CHIEF for name in processes):
        time.sleep(0.2)
        if received:
            return 128 + received[0]
        codes = {name: process.poll() for name, process in processes.items()}
        for name in (name for name, code in codes.items() if code is not None):
            code = codes[name]
            how = f"signal {-code}" if code < 0 else f"status {code}"
            if code == 0:
                del processes[name]  # the chief may end before the last worker
            elif name == CHIEF or 0 < code <= 128:
                if code < 0:
                    print(f"tuning.search: the {name} ended with {how}; the same command resumes", file=sys.stderr)
                return max(code, 1)
            else:
                now = sum(trial.state != RUNNING for trial in read_trials(directory))
                deaths, ended = (deaths + 1 if now == ended else 1), now
                if deaths > MOST_DEATHS:
                    print(f"tuning.search: workers ended {deaths} times while no trial did", file=sys.stderr)
                    return 1
                say(f"{name} ended with {how}; it is restarted and resumes its trial")
                processes[name] = start(name)
    return 0
