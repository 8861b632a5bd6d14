"""What each ingredient adds: arms by depth, the learning rate chosen for each arm, then several seeds at that rate.

python benchmarks/ablation.py --rung=digits --depths=20,44,110 --jobs=2

Resumes where it was stopped: a run whose result file is there is not run again. An arm differs from the others in the
values named below and in nothing else: data, steps, schedule, seeds are the rung's. The learning rate (multiplied by 44 /
depth) is that of `--rates` which reaches the highest validation accuracy with the search's seed, which the reported seeds
do not contain; test images play no part in the choice.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import sys

from absl import app, flags
from runs import ROOT, forget, quality, run_to_file

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "ablation"
SEARCH_SEED = 100
RATES = (0.003, 0.01, 0.03, 0.1)

RUNGS = {
    "smoke": ["--recipe=digits", "--image_size=8", "--augment=none", "--epochs=1", "--width=2"],  # to try this script
    "digits": ["--recipe=digits", "--rate_depth=44", "--image_size=8", "--augment=none", "--epochs=15", "--evaluate_every=5"],
}


@dataclasses.dataclass(frozen=True)
class Arm:
    about: str
    source: str  # "control", "paper" or "ours"
    values: dict  # of the recipe; what it leaves out is as in `_BASE`


_BASE = {
    "network": "plain",
    "initializer": "orthonormal",
    "relu_shift": 0.0,
    "regularizer": "orthonormal",
    "factor": 0.01,
    "modulation": "off",
    "optimizer": "sgd",
}
_L2 = {"initializer": "he_normal", "regularizer": "l2", "factor": 1e-4}
_SHIFT = {"relu_shift": 2.0}
_DIRAC = {**_SHIFT, "initializer": "dirac"}

ARMS = {
    "he_l2": Arm("He initialization, L2", "control", _L2),
    "orthonormal_init_l2": Arm("orthonormal initialization, L2", "control", {"regularizer": "l2", "factor": 1e-4}),
    "orthonormal": Arm("orthonormal initialization and penalty", "paper", {}),
    "paper": Arm(
        "orthonormal, and modulation between neighbours: the paper's method alone",
        "paper",
        {"modulation": "neighbour", "tolerance": 1.1},
    ),
    "anchor": Arm("orthonormal, and modulation by the anchor", "ours", {"modulation": "anchor", "tolerance": 2.0}),
    "anchor_third": Arm(
        "the same as anchor, in the first third of the steps only",
        "ours",
        {"modulation": "anchor", "tolerance": 2.0, "modulation_steps": 100},
    ),
    "relu_shift": Arm("orthonormal, shifted ReLU: max(x, -2)", "ours", _SHIFT),
    "muon": Arm("orthonormal, Muon in place of SGD", "ours", {"optimizer": "muon"}),
    "relu_shift_muon": Arm("orthonormal, shifted ReLU, Muon", "ours", {**_SHIFT, "optimizer": "muon"}),
    "dirac": Arm("kernels that start as identities, the paper's ReLU and penalty", "ours", {"initializer": "dirac"}),
    "relu_shift_dirac": Arm("identities, max(x, -2), the penalty", "ours", _DIRAC),
    "relu_shift_dirac_l2": Arm("identities, max(x, -2), L2", "ours", {**_DIRAC, "regularizer": "l2", "factor": 1e-4}),
    "relu_shift_dirac_moving": Arm(
        "identities, max(x, -2), the penalty; BatchNormalization's moving averages", "ours", {**_DIRAC, "bn_batches": 0}
    ),
    "residual_l2": Arm("the residual counterpart, He initialization, L2", "control", {**_L2, "network": "residual"}),
    "residual_orthonormal": Arm(
        "the residual counterpart, orthonormal initialization and penalty", "paper", {"network": "residual"}
    ),
}

flags.DEFINE_enum("rung", "digits", list(RUNGS), "Data and steps.")
flags.DEFINE_list("depths", ["20", "44", "110"], "Layers.")
flags.DEFINE_list("arms", list(ARMS), "Arms to run.")
flags.DEFINE_list("rates", [str(rate) for rate in RATES], "Learning rates that each arm is searched over.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds at the rate that was chosen.")
flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its share of the cores.", lower_bound=1)
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_string("results", str(RESULTS), "Folder of the result files.")
flags.DEFINE_string("runs", "runs/ablation", "Folder for the runs themselves, deleted one by one as their results are kept.")


def result_path(rung, arm, depth, rate, seed):
    return pathlib.Path(FLAGS.results, rung) / f"{arm}-depth{depth}-rate{rate}-seed{seed}.json"


def chosen_rate(rung, arm, depth, rates):
    """Returns the rate of the best search run, or `None` where one is missing."""
    paths = {rate: result_path(rung, arm, depth, rate, SEARCH_SEED) for rate in rates}
    if not all(path.exists() for path in paths.values()):
        return None
    return max(paths, key=lambda rate: quality(json.loads(paths[rate].read_text())))


def run(arm, depth, rate, seed, cores):
    path = result_path(FLAGS.rung, arm, depth, rate, seed)
    if path.exists():
        return path
    values = {**_BASE, **ARMS[arm].values, "depth": depth, "learning_rate": rate, "seed": seed}
    given = [*RUNGS[FLAGS.rung], *(f"--{name}={value}" for name, value in values.items())]
    workdir = pathlib.Path(FLAGS.runs, FLAGS.rung, path.stem).absolute()
    result = run_to_file(given, path, workdir, FLAGS.data_dir, cores, quiet=True)
    forget(workdir)
    figures = result.get("diverged") or (
        f"validation {result['validation_accuracy']:.4f}, test {result['test_accuracy']:.4f}, {result['seconds']:.0f} s"
    )
    print(f"{path.stem}: {figures}", flush=True)
    return path


def main(_):
    unknown = sorted(set(FLAGS.arms) - set(ARMS))
    if unknown:
        print(f"ablation.py: --arms must be among {', '.join(ARMS)}. Received: {', '.join(unknown)}", file=sys.stderr)
        return 2
    every = sorted(os.sched_getaffinity(0))
    shares = queue.Queue()
    for job in range(FLAGS.jobs):
        shares.put(set(every[job :: FLAGS.jobs] or every))

    def work(task):
        cores = shares.get()
        try:
            return run(*task, cores)
        finally:
            shares.put(cores)

    try:
        run_all(work)
    except RuntimeError as error:  # a run that train.py refused
        print(f"ablation.py: {error}", file=sys.stderr)
        return 1
    return 0


def run_all(work):
    """Calls `work((arm, depth, rate, seed))` for every run: a depth's search, then its seeds."""
    for depth in FLAGS.depths:
        with concurrent.futures.ThreadPoolExecutor(FLAGS.jobs) as pool:
            search = [(arm, depth, rate, SEARCH_SEED) for arm in FLAGS.arms for rate in FLAGS.rates]
            list(pool.map(work, search))
            final = []
            for arm in FLAGS.arms:
                rate = chosen_rate(FLAGS.rung, arm, depth, FLAGS.rates)
                final += [(arm, depth, rate, seed) for seed in FLAGS.seeds]
            list(pool.map(work, final))


if __name__ == "__main__":
    app.run(main)
