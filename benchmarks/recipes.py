"""Runs recipes over seeds by `train.py` and keeps what came out, one result file for each run.

python benchmarks/recipes.py --recipes=digits,digits_l2 --seeds=0,1,2
"""

import pathlib

from absl import app, flags
from runs import ROOT, run_to_file

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "recipes"

flags.DEFINE_list("recipes", ["digits", "digits_l2"], "Recipes to run.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run each with.")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_string("runs", "runs", "Folder for the runs themselves; a run that is there already is taken up or read.")


def main(_):
    for seed in FLAGS.seeds:
        for recipe in FLAGS.recipes:
            path = RESULTS / f"{recipe}-seed{seed}.json"
            workdir = pathlib.Path(FLAGS.runs, f"{recipe}-seed={seed}").absolute()
            run_to_file([f"--recipe={recipe}", f"--seed={seed}"], path, workdir, FLAGS.data_dir)
            print(path.relative_to(ROOT), flush=True)


if __name__ == "__main__":
    app.run(main)
