"""Runs recipes over seeds by `train.py` and keeps what came out, one result file for each run.

python benchmarks/recipes.py --recipes=digits,digits_l2 --seeds=0,1,2
python benchmarks/recipes.py --recipes=digits --values=crop_border=1,label_smoothing=0.1    a trial of other values
"""

import pathlib

from absl import app, flags
from runs import ROOT, run_to_file

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results"

flags.DEFINE_list("recipes", ["digits", "digits_l2"], "Recipes to run.")
flags.DEFINE_list("values", [], "Values to change in each recipe, name=value: a trial, whose result goes to results/trials.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run each with.")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_string("results", str(RESULTS), "Folder of the folders of result files.")
flags.DEFINE_string("runs", "runs", "Folder for the runs themselves; a run that is there already is taken up or read.")


def main(_):
    folder = pathlib.Path(FLAGS.results, "trials" if FLAGS.values else "recipes")
    for seed in FLAGS.seeds:
        for recipe in FLAGS.recipes:
            name = "-".join([recipe, *FLAGS.values])
            given = [f"--recipe={recipe}", *(f"--{value}" for value in FLAGS.values), f"--seed={seed}"]
            path = folder / f"{name}-seed{seed}.json"
            run_to_file(given, path, pathlib.Path(FLAGS.runs, f"{name}-seed={seed}").absolute(), FLAGS.data_dir)
            print(path, flush=True)


if __name__ == "__main__":
    app.run(main)
