"""Searches recipes by `tuning.search`, then compares each best trial with the recipe itself over seeds that no trial saw.

python benchmarks/search.py --searches=plain44,plain110 --seeds=1,2,3
python benchmarks/search.py --searches=plain110 --full      the same comparison in as many epochs as the recipe has

Resumes where it was stopped. What is found becomes a file for each search, and one for each run at a fresh seed.
"""

import json
import pathlib
import shlex
import shutil
import subprocess
import sys

from absl import app, flags
from runs import ROOT, commit, forget, run_to_file

from ortho_keras.method.files import write_json

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "search"

SEARCHES = {
    "plain44": ["--recipe=digits", "--image_size=8", "--augment=none", "--epochs=5", "--max_trials=40"],
    "plain110": ["--recipe=plain110_digits", "--epochs=5", "--max_trials=30"],
}

flags.DEFINE_list("searches", list(SEARCHES), "Searches to run.")
flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds of the comparison; the trials have seed 0.")
flags.DEFINE_bool("full", False, "Compare in the recipe's own number of epochs, not in the search's.")
flags.DEFINE_integer("workers", 0, "Trials at a time, see tuning.search.")
flags.DEFINE_string("runs", "runs/searches", "Folder for the searches and runs themselves.")


def search(name):
    """Runs a search, or goes on with it, and keeps its report; returns that."""
    directory = pathlib.Path(FLAGS.runs, name).absolute()
    given = [*SEARCHES[name], "--tuner=bayesian"]
    places = [f"--workdir={directory}", f"--workers={FLAGS.workers}"]
    revision = commit()
    subprocess.run([sys.executable, "-m", "tuning.search", *given, *places], cwd=ROOT, check=True)
    report = json.loads((directory / "report.json").read_text())
    for trial in report["trials"]:
        trial["values"] = {key: trial["recipe"][key] for key in report["parameters"]}
        del trial["recipe"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copy(directory / "search.png", RESULTS / f"{name}.png")
    command = shlex.join(["python", "-m", "tuning.search", *given])
    write_json(RESULTS / f"{name}.json", {"command": command, "commit": revision, **report})
    return report


def main(_):
    for name in FLAGS.searches:
        path = RESULTS / f"{name}.json"
        report = json.loads(path.read_text()) if path.exists() else search(name)
        for arm in ("base", "best"):
            left_out = ("--seed=", "--epochs=") if FLAGS.full else "--seed="
            given = [flag for flag in shlex.split(report[f"{arm}_command"])[2:] if not flag.startswith(left_out)]
            for seed in FLAGS.seeds:
                kept = RESULTS / f"{name}-{arm}{'-full' * FLAGS.full}-seed{seed}.json"
                if kept.exists():
                    continue
                workdir = pathlib.Path(FLAGS.runs, kept.stem).absolute()
                result = run_to_file([*given, f"--seed={seed}"], kept, workdir, quiet=True)
                forget(workdir)
                reached = result.get("diverged") or f"test {result['test_accuracy']:.4f}"
                print(f"{kept.stem}: {reached}", flush=True)


if __name__ == "__main__":
    app.run(main)
