"""Runs recipes over seeds by `train.py` and keeps what came out, one result file for each run.

python benchmarks/recipes.py --recipes=digits,digits_l2 --seeds=0,1,2
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys

from absl import app, flags

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "recipes"

flags.DEFINE_list("recipes", ["digits", "digits_l2"], "Recipes to run.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run each with.")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_string("runs", "runs", "Folder for the runs themselves; a run that is there already is taken up or read.")


def commit():
    """Returns the commit that is checked out, with `-dirty` behind where a tracked file differs from it."""
    described = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(described, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def run(recipe, seed):
    """Runs one recipe with one seed; returns the path of its result file."""
    command = ["train.py", f"--recipe={recipe}", f"--seed={seed}"]
    workdir = pathlib.Path(FLAGS.runs, f"{recipe}-seed={seed}")
    places = [f"--workdir={workdir}", *([f"--data_dir={FLAGS.data_dir}"] if FLAGS.data_dir else [])]
    revision = commit()
    subprocess.run([sys.executable, *command, *places], cwd=ROOT, check=True)
    result = json.loads((ROOT / workdir / "result.json").read_text())
    history = json.loads((ROOT / workdir / "history.json").read_text())
    names = ("step", "crossentropy", "accuracy", "validation_accuracy", "penalty")
    result["history"] = {name: [row.get(name) for row in history] for name in names}
    path = RESULTS / f"{recipe}-seed{seed}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"command": shlex.join(["python", *command]), "commit": revision, **result}, indent=1) + "\n")
    os.replace(partial, path)
    return path


def main(_):
    for seed in FLAGS.seeds:
        for recipe in FLAGS.recipes:
            print(run(recipe, seed).relative_to(ROOT), flush=True)


if __name__ == "__main__":
    app.run(main)
