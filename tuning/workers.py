"""A search in several processes: one that chooses the trials (keras-tuner's chief), and workers that train them.

keras-tuner finds its part in three environment variables. On one machine `run_all` sets them and looks after the processes.
"""

import os
import signal
import socket
import subprocess
import sys
import time

from ortho_keras.errors import InputError

ID, ADDRESS, PORT = "KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT"
DEADLINE, COUNT = "ORTHO_KERAS_SEARCH_DEADLINE", "ORTHO_KERAS_SEARCH_WORKERS"
MOST_DEATHS = 3  # of one worker, in a row


def role():
    """Returns what this process is in a search: `"alone"`, `"chief"` or `"worker"`.

    Raises:
        InputError: If only some of keras-tuner's variables are set.
    """
    given = [name for name in (ID, ADDRESS, PORT) if os.environ.get(name)]
    if not given:
        return "alone"
    if len(given) < 3:
        raise InputError(f"{ID}, {ADDRESS} and {PORT} must be set together, or none. Received: {', '.join(given)} only")
    return "chief" if "chief" in os.environ[ID] else "worker"


def count():
    """Returns how many trials run at a time, as far as this process knows."""
    return int(os.environ.get(COUNT, 1))


def deadline():
    """Returns the time, in seconds since the epoch, at which the process that started this one wants an end, or `None`."""
    return float(os.environ[DEADLINE]) if os.environ.get(DEADLINE) else None


def watch_chief(deadline):
    """Ends a chief, which would wait for its workers for ever, soon after the deadline or with the process that started it."""
    parent = os.getppid() if COUNT in os.environ else None

    def check(*_):
        if (deadline and time.time() > deadline + 60) or (parent and os.getppid() != parent):
            sys.exit(0)  # its files are whole at any time

    signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)


def run_all(workers, deadline):
    """Runs this very command as a chief and so many workers on this machine, until the search is over.

    A worker that is killed is started again under its name: the chief gives it its trial again, which goes on from its
    checkpoint. Signals are handed on.

    Returns:
        The status of the search, an int: 0, or that of a process that refused.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {ADDRESS: "127.0.0.1", PORT: str(port), COUNT: str(workers), DEADLINE: str(deadline or "")}
    command = [sys.executable, "-m", "tuning.search", *sys.argv[1:], "--workers=0"]

    def start(name):
        return subprocess.Popen(command, env={**os.environ, **common, ID: name})

    asked = []
    before = {
        signum: signal.signal(signum, lambda signum, _: asked.append(signum)) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    chief, running = start("chief"), {f"worker{index}": None for index in range(workers)}
    deaths = dict.fromkeys(running, 0)
    status = 0
    try:
        running = {name: start(name) for name in running}
        while running and not status:
            time.sleep(0.2)
            if asked:
                status = 128 + asked[0]
            elif chief.poll() is not None:
                print(
                    f"tuning.search: the chief ended with status {chief.returncode}; the same command goes on", file=sys.stderr
                )
                status = chief.returncode or 1
            for name, process in list(running.items()):
                code = process.poll()
                if code is None or status:
                    continue
                if code == 0:
                    del running[name]
                elif code < 0 and deaths[name] < MOST_DEATHS:
                    deaths[name] += 1
                    print(f"{name} was ended by signal {-code}; it is started again and goes on with its trial", flush=True)
                    running[name] = start(name)
                else:
                    status = code if code > 0 else 1
    finally:
        for process in (*(p for p in running.values() if p), chief):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in (*(p for p in running.values() if p), chief):
            process.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return status
