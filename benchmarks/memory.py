"""Peak memory of training, arm against arm: each in processes of its own, in turn, for some steps of a plain net.

python benchmarks/memory.py --depth=44 --repeats=5

Peak memory is the largest resident size of the whole process (`ru_maxrss`). Larger tensors are mapped and unmapped one by one
(glibc's MALLOC_MMAP_THRESHOLD_), or holes in the heap would make more spread than the arms do. The peaks of `--repeats`
processes, and the ratio of medians, go to `results/memory/<net>-<size>-<batch>-<precision>-<device>.json`.
"""

import os
import pathlib
import resource
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from arms import ARMS, modulation_arms, penalty_arms, training_step
from measured import device, gpu_name, write_result
from runs import ROOT
from step_time import data, kind, net

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "memory"

flags.DEFINE_integer("repeats", 5, "Processes of each arm.", lower_bound=1)
flags.DEFINE_string("arm", None, "Prints the peak of this arm, in bytes, and writes nothing.")
flags.FLAGS.set_default("results", str(RESULTS))


def arms():
    return ARMS["method"](net()) if FLAGS.compare == "method" else penalty_arms(net()) | modulation_arms(net())


def peak():
    """The largest resident size of this process after some steps, in bytes; on a GPU the most of its memory that was in use."""
    step, batch = training_step(*arms()[FLAGS.arm]()), data()
    for _ in range(4):
        step(*batch)
    if gpu_name():
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(_):
    keras.config.set_dtype_policy(FLAGS.precision)
    if FLAGS.arm:
        print(peak())
        return
    peaks, environment = {name: [] for name in arms()}, {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for _ in range(FLAGS.repeats):
        for name, found in peaks.items():
            command = [sys.executable, *sys.argv, f"--arm={name}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found.append(int(done.stdout))
    base = np.median(next(iter(peaks.values())))
    figures = {
        name: {"peak_bytes": sorted(found), "ratio": round(float(np.median(found) / base), 3)} for name, found in peaks.items()
    }
    name = f"{kind()}-{FLAGS.image_size}-{FLAGS.batch_size}-{FLAGS.precision}-{device()}.json"
    write_result(pathlib.Path(FLAGS.results, name), arms=figures)
    for name, arm in figures.items():
        print(f"{name}: {np.median(arm['peak_bytes']) / 2**20:.0f} MiB, {arm['ratio']:.3f} times {next(iter(peaks))}")


if __name__ == "__main__":
    app.run(main)
