"""What the scripts here share: a run of `train.py` in a process of its own with its result file, timings, and tables."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # scripts here use the package beside them

from ortho_keras.method.files import write_json

KEPT = ("step", "crossentropy", "accuracy", "validation_crossentropy", "validation_accuracy", "penalty")


def commit():
    """Returns the commit that is checked out, with `-dirty` behind where a tracked file but a result differs from it."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"], cwd=ROOT)
    return head + "-dirty" * bool(changed.returncode)


def run_to_file(flags, path, workdir, data_dir=None, cores=None, quiet=False):
    """Runs `train.py`, or takes up the run that is in `workdir`, and writes its result with command and commit to `path`.

    A loss that is not finite is a result too: `{"diverged": message, "recipe_name": name, "recipe": {...}}`.

    Args:
        flags: List of flags that decide what the run computes; they are the command that the result file names.
        path: Path of the result file.
        workdir: Path of the run's folder.
        data_dir: See `train.py`.
        cores: Set of CPU cores that the run may use, or `None` for all.
        quiet: bool. Whether the run's lines go to `workdir.log` instead of the screen.

    Returns:
        The content of the result file, a dict.

    Raises:
        RuntimeError: If the run ended without a result.
    """
    path, workdir, command, revision = pathlib.Path(path), pathlib.Path(workdir), ["train.py", *flags], commit()
    places = [f"--workdir={workdir}", *([f"--data_dir={data_dir}"] if data_dir else [])]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(f"{workdir.name}.log")
    with open(log, "w") if quiet else open(os.devnull, "w") as file:
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *flags, *places],
            stdout=file if quiet else None,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
        )
    message = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    if done.returncode == 0:
        result = json.loads((workdir / "result.json").read_text())
        history = json.loads((workdir / "history.json").read_text())
        result["history"] = {name: [row.get(name) for row in history] for name in KEPT}
    elif done.returncode == 1 and "the loss became" in message:
        (name,) = (flag.removeprefix("--recipe=") for flag in flags if flag.startswith("--recipe="))
        recipe = json.loads((workdir / "run.json").read_text())["recipe"]
        result = {"diverged": message.removeprefix("train.py: ").partition(": try")[0], "recipe_name": name, "recipe": recipe}
    else:
        raise RuntimeError(f"{shlex.join(command)} ended with status {done.returncode}: {message}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"command": shlex.join(["python", *command]), "commit": revision, **result})
    return result


def rounds(steps, count, warm_up):
    """Calls the functions `{name: step}` in turn, in an order that alternates; returns `{name: seconds of each round}`.

    The first `warm_up` rounds trace, and do not count.
    """
    seconds = {name: [] for name in steps}
    for number in range(count + warm_up):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            steps[name]()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio_quartiles(values, base):
    """Returns the quartiles of each value over the base of its round."""
    return [round(float(ratio), 3) for ratio in np.percentile(np.divide(values, base), (25, 50, 75))]


def timing(seconds, base):
    """Returns the figures of an arm: the median of its rounds, and the quartiles of each over the base of the same round."""
    return {"median_seconds": round(float(np.median(seconds)), 5), "ratio_quartiles": ratio_quartiles(seconds, base)}


def quality(result):
    """What a search maximizes: validation accuracy, then the lower validation cross-entropy."""
    if "diverged" in result:
        return 0.0, float("-inf")
    return result["validation_accuracy"], -result["history"]["validation_crossentropy"][-1]


def table(header, rows):
    """Returns a Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def forget(workdir):
    """Deletes a run's folder and log, when its result file is written."""
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.with_name(f"{workdir.name}.log").unlink(missing_ok=True)
