"""The paper's table: its arms, and ours, at its depths on CIFAR-10, with the paper's schedule at an eighth of its length.

python benchmarks/paper.py --data_dir=PATH             runs what is missing; stopped, it resumes in the middle of a run
python benchmarks/paper.py --table                     prints the table of the committed results, draws the curves

All arms share the images, their order, crop and flip, the batch size, SGD with momentum 0.9 and the step schedule. The learning
rate of an arm at a depth is the one of two or three with the highest validation accuracy after 800 steps of that same run (the
seed of this search is none of the reported ones); test images play no part in a choice. A run whose training accuracy is at
chance after 2,000 steps ends there and counts as it is.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import queue
import sys

from absl import app, flags
from runs import KEPT, ROOT, commit, forget, table

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as train.py sets it

import keras

from ortho_keras.method.errors import NonFiniteLossError
from ortho_keras.method.files import write_json
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.recipes import RECIPES
from ortho_keras.trainer.run import run
from ortho_keras.trainer.runtime import slowdown

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "paper"
BASE = "plain44_cifar10"
STEPS, WARMUP, SEARCH_STEPS, CHANCE_STEPS = 8000, 400, 800, 2000
EPOCHS = 23  # of 351 steps: more than 8,000 steps
SEARCH_SEED = 100
GRID = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
FIRST_DEPTH, FIRST_RATES = 44, (0.1, 0.03, 0.01)
FACTORS = (1e-4, 1e-2)  # of the penalty: whichever has the higher validation accuracy after CHANCE_STEPS at FIRST_DEPTH

_L2 = {"initializer": "he_normal", "regularizer": "l2"}
_OURS = {"initializer": "dirac", "relu_shift": 1.0}


@dataclasses.dataclass(frozen=True)
class Arm:
    about: str
    values: dict  # of the recipe, where they differ from orthonormal initialization and penalty
    depths: tuple = (20, 44, 110)
    paper: dict = dataclasses.field(default_factory=dict)  # depth -> the paper's figure with its standing

    @property
    def penalized(self):
        return self.values.get("regularizer") != "l2"


ARMS = {
    "he_l2": Arm(
        "He initialization, L2 (the paper's control)",
        _L2,
        paper={44: "83.8 (read off a figure)", 110: "does not train (as cited by others)"},
    ),
    "orthonormal": Arm(
        "orthonormal initialization and penalty (the paper's first half)",
        {},
        paper={44: "87.2 (read off a figure)"},
    ),
    "neighbour": Arm(
        "the same with modulation between neighbours, tolerance 1.1 (the paper's method)",
        {"modulation": "neighbour", "tolerance": 1.1},
        (44, 110),
        {44: "88.42 (best, as cited by others)", 110: "81.6 (as cited by others)"},
    ),
    "anchor": Arm("the same with modulation by the anchor (ours)", {"modulation": "anchor"}, (44, 110)),
    "ours": Arm("orthonormal penalty, ShiftedReLU, identities (ours)", _OURS),
    "ours_anchor": Arm("the same with modulation by the anchor (ours)", {**_OURS, "modulation": "anchor"}, (44, 110)),
    "residual_l2": Arm(
        "residual, He initialization, L2",
        {**_L2, "network": "residual"},
        paper={44: "87.9 (read off a figure)", 110: "86.5 (read off a figure)"},
    ),
    "residual_orthonormal": Arm(
        "residual, orthonormal initialization and penalty",
        {"network": "residual"},
        paper={110: "90.0 (read off a figure)"},
    ),
}

flags.DEFINE_bool("table", False, "Print the table of the results that are there, draw the curves, and end.")
flags.DEFINE_list("depths", ["44", "110", "20"], "Depths, in this order; those after the first take their rates from 44.")
flags.DEFINE_list("arms", list(ARMS), f"Arms, in this order: {', '.join(ARMS)}.")
flags.DEFINE_list("seeds", ["0"], "Seeds of the reported runs.")
flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its share of the cores.", lower_bound=1)
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_string("results", str(RESULTS), "Folder of the result files.")
flags.DEFINE_string("runs", "runs/paper", "Folder of the runs themselves, each deleted when its result is written.")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the table."""

    arm: str
    depth: int
    factor: float
    rate: float
    steps: int
    seed: int

    @property
    def path(self):
        name = f"{self.arm}-depth{self.depth}-factor{self.factor}-rate{self.rate}-steps{self.steps}-seed{self.seed}.json"
        return pathlib.Path(FLAGS.results, name)

    def result(self):
        return json.loads(self.path.read_text()) if self.path.exists() else None

    def recipe(self, precision):
        """The recipe of the whole run; a search is the beginning of one, before the rate falls for the first time."""
        values = {"depth": self.depth, "factor": self.factor, "learning_rate": self.rate, "seed": self.seed}
        values |= {"max_steps": self.steps, "epochs": EPOCHS, "warmup_steps": WARMUP, "evaluate_every": 3}
        if self.steps < STEPS:
            values["schedule"] = "constant"
        return dataclasses.replace(RECIPES[BASE].recipe, **values, **ARMS[self.arm].values, precision=precision)


class EndAtChance(keras.callbacks.Callback):
    """Ends a run whose training accuracy over an epoch is at chance after `CHANCE_STEPS`."""

    def on_epoch_end(self, epoch, logs=None):
        chance = 1 / self.model.output_shape[-1]
        images = 128 * 351
        if logs["step"] >= CHANCE_STEPS and logs["accuracy"] <= chance + 3 * math.sqrt(chance * (1 - chance) / images):
            self.model.stop_training = True


def train(cell, flag_values):
    """Runs one cell in a process of its own and writes its result file."""
    FLAGS(["paper.py", *flag_values])
    precision = "mixed_bfloat16" if slowdown("bfloat16") < 1 else "float32"
    recipe = cell.recipe(precision)
    workdir = pathlib.Path(FLAGS.runs, cell.path.stem).absolute()
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "train.py", f"--recipe={BASE}", *RECIPES[BASE].changes(recipe)]
    origin = {"command": " ".join(command), "commit": commit(), "arm": cell.arm}
    with open(workdir.with_suffix(".log"), "a") as log:
        try:
            result = run(
                recipe,
                workdir,
                FLAGS.data_dir,
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
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(cell.path, {**origin, **result})
    forget(workdir)


def quality(result):
    """What a search maximizes: validation accuracy, then the lower validation cross-entropy."""
    if "diverged" in result:
        return 0.0, float("-inf")
    return result["validation_accuracy"], -result["history"]["validation_crossentropy"][-1]


def best(cells):
    """The best of cells, `None` where a result is missing."""
    results = {cell: cell.result() for cell in cells}
    return None if None in results.values() else max(results, key=lambda cell: quality(results[cell]))


def rates(arm, depth, factor):
    """Three rates at the first depth; elsewhere the two of the grid that are nearest to its choice times 44 / depth."""
    if depth == FIRST_DEPTH:
        return FIRST_RATES
    chosen = chosen_rate(arm, FIRST_DEPTH, factor)
    if chosen is None:
        return None
    aim = chosen * FIRST_DEPTH / depth
    return tuple(sorted(sorted(GRID, key=lambda rate: abs(math.log(rate / aim)))[:2], reverse=True))


def searches(arm, depth, factor):
    return [Cell(arm, depth, factor, rate, SEARCH_STEPS, SEARCH_SEED) for rate in rates(arm, depth, factor) or ()]


def chosen_rate(arm, depth, factor):
    chosen = best(searches(arm, depth, factor) or [Cell(arm, depth, factor, 0, SEARCH_STEPS, SEARCH_SEED)])
    return chosen and chosen.rate


def factor_trials():
    """The two runs that choose the penalty's factor."""
    rates = {factor: chosen_rate("orthonormal", FIRST_DEPTH, factor) for factor in FACTORS}
    return [Cell("orthonormal", FIRST_DEPTH, factor, rate, CHANCE_STEPS, SEARCH_SEED) for factor, rate in rates.items() if rate]


def chosen_factor(arm):
    if not ARMS[arm].penalized:
        return 1e-4
    trials = factor_trials()
    chosen = best(trials) if len(trials) == len(FACTORS) else None
    return chosen and chosen.factor


def final(arm, depth, seed):
    """The reported run, `None` where what it takes its factor or rate from is missing."""
    factor = chosen_factor(arm)
    rate = factor and chosen_rate(arm, depth, factor)
    return Cell(arm, depth, factor, rate, STEPS, seed) if rate else None


class Workers:
    """Runs cells in processes, each on a share of the cores that no other process here uses."""

    def __init__(self, jobs):
        every = sorted(os.sched_getaffinity(0))
        self.jobs = jobs
        self.shares = queue.Queue()
        for job in range(jobs):
            self.shares.put(set(every[job::jobs] or every))

    def run(self, cells):
        for cell in cells:
            if cell.path.exists():
                continue
            share = self.shares.get()
            try:
                os.sched_setaffinity(0, share)  # of this thread: the process inherits it
                process = multiprocessing.get_context("spawn").Process(target=train, args=(cell, sys.argv[1:]))
                process.start()
                process.join()
            finally:
                self.shares.put(share)
            if process.exitcode:
                raise RuntimeError(f"{cell.path.stem} ended with status {process.exitcode}: see its log in {FLAGS.runs}")
            result = cell.result()
            reached = result.get("diverged") or f"test {result['test_accuracy']:.4f}, {result['seconds']:.0f} s"
            print(f"{cell.path.stem}: {reached}", flush=True)

    def each(self, tasks):
        """Calls tasks, as many at a time as there are jobs."""
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            for done in [pool.submit(task) for task in tasks]:
                done.result()


def run_all():
    workers = Workers(FLAGS.jobs)
    arms, seeds = FLAGS.arms, [int(seed) for seed in FLAGS.seeds]
    if any(ARMS[arm].penalized for arm in arms):
        workers.each([functools.partial(workers.run, searches("orthonormal", FIRST_DEPTH, factor)) for factor in FACTORS])
        workers.each([functools.partial(workers.run, [trial]) for trial in factor_trials()])

    def one(arm, depth):
        factor = chosen_factor(arm)
        workers.run(searches(arm, FIRST_DEPTH, factor))
        workers.run(searches(arm, depth, factor))
        workers.run([final(arm, depth, seed) for seed in seeds])

    for depth in map(int, FLAGS.depths):
        workers.each([functools.partial(one, arm, depth) for arm in arms if depth in ARMS[arm].depths])


def rows(seeds):
    """The table: a row for each arm and depth that has a result, and the paper's figure beside it."""
    found = []
    for arm, settings in ARMS.items():
        for depth in settings.depths:
            paper = settings.paper.get(depth, "")
            cells = [cell for seed in seeds if (cell := final(arm, depth, seed))]
            results = [result for cell in cells if (result := cell.result())]
            if not results:
                found.append([settings.about, depth, "not yet", "", "", "", "", paper])
            for result in results:
                recipe = Recipe.from_json(result["recipe"])
                if "diverged" in result:
                    reached = [result["diverged"], "", "", ""]
                else:
                    steps = "" if result["steps"] == STEPS else f" (ended at chance, step {result['steps']})"
                    reached = [
                        f"{100 * result['test_accuracy']:.2f}{steps}",
                        f"{100 * result['training_accuracy']:.2f}",
                        f"{result['seconds']:.0f}",
                        recipe.precision,
                    ]
                found.append([settings.about, depth, *reached, f"{recipe.learning_rate:g}", paper])
    return found


def main(_):
    unknown = sorted(set(FLAGS.arms) - set(ARMS))
    if unknown:
        print(f"paper.py: --arms must be among {', '.join(ARMS)}. Received: {', '.join(unknown)}", file=sys.stderr)
        return 2
    if FLAGS.table:
        header = ["arm", "layers", "test accuracy, %", "training, %", "seconds", "precision", "rate", "the paper's, %"]
        print(table(header, rows([int(seed) for seed in FLAGS.seeds])))
        return 0
    run_all()
    return 0


if __name__ == "__main__":
    app.run(main)
