"""How deep a plain net can be: digits of 8x8 pixels, one recipe at growing depth, with the time of the whole process.

python benchmarks/depth.py --depths=1004,3002

Each depth is `train.py --recipe=plain1004_digits` with its `--depth` and `--epochs`; a run whose result file is there is not
run again, and one that was stopped goes on.
"""

import pathlib

from absl import app, flags
from runs import ROOT, forget, run_to_file

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "depth"

flags.DEFINE_list("depths", ["1004"], "Layers.")
flags.DEFINE_list("seeds", ["0"], "Seeds to run each with.")
flags.DEFINE_integer("epochs", 5, "Passes over the 1,293 training images.", lower_bound=1)
flags.DEFINE_string("runs", "runs/depth", "Folder for the runs themselves, deleted one by one as their results are kept.")


def main(_):
    for depth in FLAGS.depths:
        for seed in FLAGS.seeds:
            path = RESULTS / f"depth{depth}-epochs{FLAGS.epochs}-seed{seed}.json"
            if path.exists():
                continue
            values = {"depth": depth, "epochs": FLAGS.epochs, "evaluate_every": FLAGS.epochs, "seed": seed}
            given = ["--recipe=plain1004_digits", *(f"--{name}={value}" for name, value in values.items())]
            workdir = pathlib.Path(FLAGS.runs, path.stem).absolute()
            result = run_to_file(given, path, workdir)
            forget(workdir)
            print(f"{path.stem}: test {result['test_accuracy']:.4f}, {result['process_seconds']:.0f} s in all", flush=True)


if __name__ == "__main__":
    app.run(main)
