"""All that needs a GPU: the tests marked `gpu`, and the measurements of step time, loop, memory and inference.

python benchmarks/gpu.py
python benchmarks/gpu.py --small --results=DIRECTORY     the same on any machine, with a small net

The parts are processes in turn, the most wanted first; one that fails is named at the end and does not stop the others.
Result files carry the GPU's name, and `pages.py` writes their tables.
"""

import os
import subprocess
import sys
import time

from absl import app, flags
from runs import ROOT

FLAGS = flags.FLAGS

flags.DEFINE_bool("small", False, "A net of 8 layers in place of all nets, in float32, and no tests.")
flags.DEFINE_string("results", str(ROOT / "benchmarks" / "results"), "Folder of the folders of result files.")

NETS = {
    "plain44": ["--depth=44"],
    "plain110": ["--depth=110"],
    "plain101_imagenet": ["--net=wide", "--image_size=224", "--batch_size=64"],
}
COMPILED = ("plain44", "plain110")  # by XLA too; the wide net's compilation takes minutes
SMALL = ["--depth=8", "--image_size=8", "--batch_size=4"]
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def parts():
    """Yields `(folder of results, words)`: the words of each part's command; the tests have no folder."""
    nets, precisions, rounds = (["small"], PRECISIONS[:1], "1") if FLAGS.small else (list(NETS), PRECISIONS, "30")
    if not FLAGS.small:
        yield None, ["-m", "pytest", "-m", "gpu", "-n", "0"]

    def step_time(net, precision, *more):
        given = [*NETS.get(net, SMALL), f"--precision={precision}", f"--rounds={rounds}"]
        return "step_time", ["step_time.py", "--compare=method", *given, *more]

    for net in nets:
        for precision in precisions:
            yield step_time(net, precision)
    cifar = SMALL if FLAGS.small else ["--depth=44", "--image_size=32", "--batch_size=128"]
    epochs = [f"--images={16 if FLAGS.small else 12800}", f"--rounds={1 if FLAGS.small else 5}"]
    yield "loop", ["loop.py", *cifar, *epochs]
    yield "inference", ["inference.py", *cifar[:2], f"--rounds={1 if FLAGS.small else 200}"]
    yield "memory", ["memory.py", *cifar, f"--precision={precisions[-1]}", "--compare=method", "--repeats=1"]
    for net in nets if FLAGS.small else COMPILED:
        yield step_time(net, precisions[len(precisions) // 2], "--jit_compile")


def main(_):
    failed, environment = [], {**os.environ, "ORTHO_KERAS_TEST_GPU": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    for folder, (script, *given) in parts():
        if folder:
            script = str(ROOT / "benchmarks" / script)
            given.append(f"--results={os.path.join(FLAGS.results, folder)}")
        started = time.perf_counter()
        print(" ".join(["python", script, *given]), flush=True)
        done = subprocess.run([sys.executable, script, *given], cwd=ROOT, env=environment)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
        if done.returncode:
            failed.append(f"{script} {' '.join(given)}")
    print("\n".join(f"failed: {command}" for command in failed) or "all parts ended well", flush=True)
    return bool(failed)


if __name__ == "__main__":
    app.run(main)
