"""Trains a recipe: flags in; result.json, curves.png and final.keras out.

python train.py                                       44 layers on handwritten digits, no download
python train.py --recipe=plain44_cifar10 --epochs=5   any value of a recipe is a flag (--list_recipes)

On two machines, the same command on each, with index 0 on the first (which writes the files) and index 1 on the second:

TF_CONFIG='{"cluster": {"worker": ["host0:5000", "host1:5000"]}, "task": {"type": "worker", "index": 0}}' python train.py
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import re
import signal
import statistics
import sys
import tempfile

from absl import app, flags, logging

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's notes on what its build could do
if platform.machine().lower() in ("x86_64", "amd64"):  # convolutions take half the time where TensorFlow leaves it off
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # not all of a GPU's memory at once: runs can share it
_NOTES = re.compile(r"before absl::InitializeLog|oneDNN custom operations|Could not find cuda drivers|failed call to cuInit")
_DEFAULT_RECIPE = "digits"
LONGEST_NAME = 200  # bytes of a folder's name, of the 255 that file systems take


@contextlib.contextmanager
def without_start_up_notes():
    """Drops what TensorFlow's start-up says on a machine without a GPU, which no setting of its own turns off."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines():
                if not _NOTES.search(line):
                    print(line, file=sys.stderr)


with without_start_up_notes():
    import tensorflow as tf

    tf.config.list_physical_devices()
    logging.set_verbosity(logging.WARNING)
    tf.get_logger().setLevel("WARNING")
    from ortho_keras.method.errors import InputError, Interrupted, NonFiniteLossError, WorkerLostError
    from ortho_keras.trainer import runtime
    from ortho_keras.trainer.export import check_export, deploy
    from ortho_keras.trainer.recipe import Recipe, read_recipe
    from ortho_keras.trainer.recipes import RECIPES, find_preset
    from ortho_keras.trainer.result import hardware
    from ortho_keras.trainer.run import run

FLAGS = flags.FLAGS
RESULTS = pathlib.Path(__file__).resolve().parent / "benchmarks" / "results" / "recipes"

flags.DEFINE_string(
    "recipe",
    None,
    f"A frozen set of values, see --list_recipes; {_DEFAULT_RECIPE} by default. The flags below override its values.",
)
flags.DEFINE_string(
    "recipe_file", None, "The recipe in a JSON file instead: a search's best.json, a run's run.json or result.json."
)
flags.DEFINE_bool("list_recipes", False, "Print the recipes, with what each reaches and in how long, and end.")
flags.DEFINE_string("workdir", "", "Folder of the run; by default runs/<recipe>, with the overridden values behind.")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_string(
    "export",
    None,
    "At the end, writes the net for inference, BatchNormalization folded, to this path: *.keras, *.tflite, or a folder.",
)
flags.DEFINE_integer(
    "keep_checkpoints", 2, "How many checkpoints are kept; the newest is used, or the one before if it is damaged."
)
flags.DEFINE_integer(
    "signal_every",
    0,
    "Measures the signal, layer by layer, every so many steps (signals.csv, signals.png, TensorBoard); 0: never.",
)
flags.DEFINE_string(
    "strategy",
    "auto",
    "none | mirrored (this machine's devices) | multi_worker (the machines in TF_CONFIG) | auto (what there is).",
)
flags.DEFINE_string(
    "devices", "", "How many of this machine's devices, or which: 2, or GPU:0,GPU:2. By default all GPUs, or the CPU."
)
flags.DEFINE_bool("jit_compile", False, "Compile the training step by XLA (one replica only).")
flags.DEFINE_bool("deterministic", False, "Two runs with one seed are equal to the bit; slower.")
flags.DEFINE_bool("tf32", False, "Let GPUs round the factors of float32 products to 10 bits, which is faster.")
_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string, bool: flags.DEFINE_bool}
for _field in dataclasses.fields(Recipe):
    _choices = _field.metadata["choices"]
    _among = f" ({' | '.join(_choices)})" if _choices else ""
    _help = f"{_field.metadata['help']}{_among}. By default the recipe's value."
    _DEFINE[_field.type](_field.name, None, _help)
flags.DEFINE_alias("input_size", "image_size")


def recipe_from_flags():
    """Returns the recipe with the flags' values in it, its name, and the values that were overridden, a dict."""
    if FLAGS.recipe and FLAGS.recipe_file:
        raise InputError(f"--recipe and --recipe_file must not both be given. Received: {FLAGS.recipe}, {FLAGS.recipe_file}")
    if FLAGS.recipe_file:
        name, recipe = read_recipe(FLAGS.recipe_file)
    else:
        name = FLAGS.recipe or _DEFAULT_RECIPE
        recipe = find_preset(name).recipe
    given = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(recipe, **given).check(), name, given


def default_workdir(name, given):
    if FLAGS.recipe_file:  # by file: recipes of one name may be many
        path = pathlib.Path(FLAGS.recipe_file).absolute()
        name = f"{path.parent.name}-{path.stem}"
    values = (f"{key}={str(value).replace('/', '_')}" for key, value in given.items())
    folder = "-".join([name, *values])
    if len(folder.encode()) > LONGEST_NAME:
        folder = f"{name}-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"
    return pathlib.Path("runs", folder)


def list_recipes():
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--list_recipes | head` ends quietly
    for name, preset in RECIPES.items():
        print(f"{name}\n    {preset.about}")
        if preset.paper:
            print(f"    paper: {preset.paper} % test accuracy")
        results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-seed*.json"))]
        results = [result for result in results if preset.gave(result)]
        if results:
            accuracy = 100 * statistics.mean(result["test_accuracy"] for result in results)
            seconds = statistics.mean(result["seconds"] for result in results)
            print(
                f"    measured: {accuracy:.2f} % test accuracy, mean of {len(results)} seed(s), in "
                f"{seconds:.0f} s of training on {hardware(results[0]['device'])}"
            )
        else:
            print("    measured: not yet")
        print("    " + " ".join(f"--{key}={value}" for key, value in preset.recipe.to_json().items()))


def main(_):
    if FLAGS.list_recipes:
        list_recipes()
        return 0
    try:
        recipe, name, given = recipe_from_flags()
        workdir = pathlib.Path(FLAGS.workdir or default_workdir(name, given)).expanduser()
        if FLAGS.keep_checkpoints < 1:
            raise InputError(f"--keep_checkpoints must be at least 1. Received: {FLAGS.keep_checkpoints}")
        if FLAGS.signal_every < 0:
            raise InputError(f"--signal_every must be at least 0. Received: {FLAGS.signal_every}")
        if FLAGS.export is not None:
            check_export(FLAGS.export)
        for value, ruler in recipe.without_effect().items():
            if value in given:
                print(f"train.py: --{value} has no effect with {ruler}", file=sys.stderr)
        machine = runtime.start(FLAGS.strategy, FLAGS.devices, FLAGS.jit_compile, FLAGS.deterministic, FLAGS.tf32)
        result = run(
            recipe,
            workdir,
            FLAGS.data_dir,
            name,
            machine,
            keep_checkpoints=FLAGS.keep_checkpoints,
            signal_every=FLAGS.signal_every,
        )
        exported = deploy(pathlib.Path(workdir, "final.keras"), FLAGS.export) if FLAGS.export and machine.is_chief else ""
    except (ImportError, InputError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (NonFiniteLossError, WorkerLostError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"train.py: {error}; the same command goes on from there", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("train.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    if not machine.is_chief:
        return 0
    accuracies = {
        "test accuracy": result["test_accuracy"],
        "test top-5 accuracy": result.get("test_top5_accuracy"),
        "test accuracy with mirror images": result.get("test_mirrored_accuracy"),
        "validation accuracy": result["validation_accuracy"],
    }
    shown = [f"{name} {value:.4f}" for name, value in accuracies.items() if value is not None]
    if result.get("skipped_images"):
        shown.append(f"{result['skipped_images']} images skipped, which do not decode")
    shown.append(f"{result['steps']} steps in {result['seconds']:.0f} s")
    print(f"{', '.join(shown)}: {workdir}/result.json, curves.png, final.keras")
    if exported:
        print(exported)
    return 0


def parse_flags(argv, program="train.py"):
    """absl's parser, with an unknown or unreadable flag told in one line."""
    try:
        rest = FLAGS(argv)
    except (flags.Error, ValueError) as error:  # the latter at --noname=value
        print(f"{program}: {' '.join(str(error).split())} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)
    if len(rest) > 1:
        print(f"{program}: every argument must be a flag, --name=value. Received: {' '.join(rest[1:])}", file=sys.stderr)
        sys.exit(2)
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
