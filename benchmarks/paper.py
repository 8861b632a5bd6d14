"""The paper's table: its arms, and ours, at its depths on CIFAR-10, with the paper's schedule at an eighth of its length.

python benchmarks/paper.py --data_dir=PATH             runs what is missing; stopped, it resumes in the middle of a run
python benchmarks/paper.py --table                     prints the table of the results that are there

All arms share the images, their order, crop and flip, the batch size, SGD with momentum 0.9 and the step schedule. The learning
rate of an arm at a depth is the one of two or three with the highest validation accuracy after 800 steps of that same run (the
seed of this search is none of the reported ones); test images play no part in a choice. A run whose training accuracy is at
chance after 2,000 steps ends there and counts as it is.
"""

import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import pathlib
import queue
import sys

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import ortho_train  # noqa: F401 - TensorFlow's settings as in train.py; the processes inherit them

FLAGS = flags.FLAGS

from paper_cells import ARMS, BASE, CHANCE_STEPS, FACTORS, FIRST_DEPTH, RESULTS, Table
from runs import KEPT, commit, forget

flags.DEFINE_bool("table", False, "Print the table of the results that are there, and end.")
flags.DEFINE_list("depths", ["44", "110", "20"], "Depths, in this order; those after the first take their rates from 44.")
flags.DEFINE_list("arms", list(ARMS), f"Arms, in this order: {', '.join(ARMS)}.")
flags.DEFINE_list("seeds", ["0"], "Seeds of the reported runs.")
flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its share of the cores.", lower_bound=1)
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_string("results", str(RESULTS), "Folder of the result files.")
flags.DEFINE_string("runs", "runs/paper", "Folder of the runs themselves, each deleted when its result is written.")


def train(cell, path, runs, data_dir):
    """Runs one cell, to be called in a process of its own, and writes its result file."""
    import keras

    from ortho_keras.method.errors import NonFiniteLossError
    from ortho_keras.method.files import write_json
    from ortho_keras.trainer.recipes import RECIPES
    from ortho_keras.trainer.run import run
    from ortho_keras.trainer.runtime import slowdown

    class EndAtChance(keras.callbacks.Callback):
        """Ends a run whose training accuracy over an epoch is at chance after `CHANCE_STEPS`."""

        def on_epoch_end(self, epoch, logs=None):
            chance = 1 / self.model.output_shape[-1]
            images = recipe.batch_size * 351
            limit = chance + 3 * math.sqrt(chance * (1 - chance) / images)
            if logs["step"] >= CHANCE_STEPS and logs["accuracy"] <= limit:
                self.model.stop_training = True

    recipe = cell.recipe("mixed_bfloat16" if slowdown("bfloat16") < 1 else "float32")
    workdir = pathlib.Path(runs, cell.name).absolute()
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "train.py", f"--recipe={BASE}", *RECIPES[BASE].changes(recipe.to_json())]
    origin = {"command": " ".join(command), "commit": commit(), "arm": cell.arm}
    with open(workdir.with_name(f"{cell.name}.log"), "a") as log:
        try:
            result = run(
                recipe,
                workdir,
                data_dir,
                cell.arm,
                callbacks=[EndAtChance()],
                keep_checkpoints=1,
                log=lambda line: print(line, file=log, flush=True),
            )
        except NonFiniteLossError as error:
            result = {"diverged": str(error).partition(": try")[0], "recipe": recipe.to_json(), "seed": recipe.seed}
        else:
            history = json.loads((workdir / "history.json").read_text())
            result["history"] = {name: [row.get(name) for row in history] for name in KEPT}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**origin, **result})
    forget(workdir)


class Workers:
    """Runs cells in processes, each on a share of the cores that no other process here uses."""

    def __init__(self, jobs, results):
        self.jobs, self.results, self.shares = jobs, results, queue.Queue()
        cores = sorted(os.sched_getaffinity(0))
        for job in range(jobs):
            self.shares.put(set(cores[job::jobs] or cores))

    def run(self, cells):
        for cell in cells:
            path = self.results.path(cell)
            if path.exists():
                continue
            share = self.shares.get()
            try:
                os.sched_setaffinity(0, share)  # of this thread: the process inherits it
                arguments = (cell, path, FLAGS.runs, FLAGS.data_dir)
                process = multiprocessing.get_context("spawn").Process(target=train, args=arguments)
                process.start()
                process.join()
            finally:
                self.shares.put(share)
            if process.exitcode:
                raise RuntimeError(f"{cell.name} ended with status {process.exitcode}: see its log in {FLAGS.runs}")
            result = self.results.result(cell)
            reached = result.get("diverged") or f"test {result['test_accuracy']:.4f}, {result['seconds']:.0f} s"
            print(f"{cell.name}: {reached}", flush=True)

    def each(self, tasks):
        """Calls tasks, as many at a time as there are jobs."""
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            for done in [pool.submit(task) for task in tasks]:
                done.result()


def run_all(results):
    workers = Workers(FLAGS.jobs, results)
    if any(ARMS[arm].penalized for arm in FLAGS.arms):
        searches = [results.searches("orthonormal", FIRST_DEPTH, factor) for factor in FACTORS]
        workers.each([functools.partial(workers.run, cells) for cells in searches])
        workers.each([functools.partial(workers.run, [trial]) for trial in results.factor_trials()])

    def one(arm, depth):
        factor = results.factor(arm)
        workers.run(results.searches(arm, FIRST_DEPTH, factor))
        workers.run(results.searches(arm, depth, factor))
        workers.run([results.reported(arm, depth, int(seed)) for seed in FLAGS.seeds])

    for depth in map(int, FLAGS.depths):
        workers.each([functools.partial(one, arm, depth) for arm in FLAGS.arms if depth in ARMS[arm].depths])


def main(_):
    unknown = sorted(set(FLAGS.arms) - set(ARMS))
    if unknown:
        print(f"paper.py: --arms must be among {', '.join(ARMS)}. Received: {', '.join(unknown)}", file=sys.stderr)
        return 2
    results = Table(FLAGS.results)
    if FLAGS.table:
        print("\n\n".join(f"seed {seed}\n\n{results.by_depth(int(seed))}" for seed in FLAGS.seeds))
        return 0
    run_all(results)
    return 0


if __name__ == "__main__":
    app.run(main)
