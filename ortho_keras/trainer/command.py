"""Trains a recipe and writes result.json, curves.png and final.keras.

ortho-train                                       44 layers on handwritten digits, no download
ortho-train --recipe=plain44_cifar10 --epochs=5   every value of a recipe is a flag (--list_recipes)
"""

import dataclasses
import hashlib
import json
import pathlib
import signal
import statistics
import sys

from absl import flags

from ortho_keras.method.console import say
from ortho_keras.method.errors import InputError, Interrupted, NonFiniteLossError, WorkerLostError
from ortho_keras.method.files import expanded
from ortho_keras.trainer import runtime
from ortho_keras.trainer.export import check_export, deploy
from ortho_keras.trainer.recipe import Recipe, read_recipe
from ortho_keras.trainer.recipes import RECIPES, Preset, find_preset
from ortho_keras.trainer.result import hardware
from ortho_keras.trainer.run import run
from ortho_keras.version import __version__

DEFAULT_RECIPE = "digits"
MOST_OF_AN_ERROR = 1000  # characters
LONGEST_NAME = 200  # bytes of a folder's name; file systems allow 255

FLAGS = flags.FLAGS
RESULTS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SHORTER = ("epochs", "max_steps", "evaluate_every", "learning_rate", "precision")  # what a shorter run of a recipe may change

flags.DEFINE_string("recipe", None, f"Name of a recipe, {DEFAULT_RECIPE} by default. The flags below override its values.")
flags.DEFINE_string("recipe_file", None, "JSON file with a recipe: a search's best.json, a run's run.json or result.json.")
flags.DEFINE_string("list_recipes", None, "Print all recipes and exit; --list_recipes=NAME: all values of one recipe.")
flags.DEFINE_string("workdir", "", "Folder of the run. Default: runs/<recipe>-<overridden values>.")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data. Default: TFDS's own.")
flags.DEFINE_string("export", None, "Write the model for inference to this path at the end: *.keras, *.tflite, or a folder.")
flags.DEFINE_integer("keep_checkpoints", 2, "Number of checkpoints to keep.", lower_bound=1)
flags.DEFINE_float("checkpoint_minutes", 10.0, "Minutes from one checkpoint to the next within an epoch.", lower_bound=0)
flags.DEFINE_integer("signal_every", 0, "Steps from one SignalMonitor measurement to the next; 0: none.", lower_bound=0)
flags.DEFINE_enum(
    "strategy",
    "auto",
    runtime.STRATEGIES,
    "mirrored: this machine's devices; multi_worker: the machines in TF_CONFIG; auto: whatever is available.",
)
flags.DEFINE_string("devices", "", "Number or names of local devices: 2, or GPU:0,GPU:2. Default: all GPUs, or the CPU.")
flags.DEFINE_bool("jit_compile", False, "Compile the training step by XLA (one replica only).")
flags.DEFINE_bool("deterministic", False, "Make two runs with one seed equal to the bit; slower.")
flags.DEFINE_bool("tf32", False, "Let GPUs round the factors of float32 products to 10 bits, which is faster.")

flags.DEFINE_bool("version", False, "Print the version and exit.")

_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string, bool: flags.DEFINE_bool}
_DEFAULTS = RECIPES[DEFAULT_RECIPE].recipe
for _field in dataclasses.fields(Recipe):
    _help = f"{_field.metadata['help']}. Default: the recipe's; of {DEFAULT_RECIPE}: {getattr(_DEFAULTS, _field.name)}."
    if isinstance(_field.metadata["choices"], tuple):  # regularizers may still be registered: Recipe checks those
        flags.DEFINE_enum(_field.name, None, _field.metadata["choices"], _help)
    else:
        _DEFINE[_field.type](_field.name, None, _help)
flags.DEFINE_alias("input_size", "image_size")


def program_of(argv):
    return pathlib.Path(argv[0]).name


def show_flags_in_help():
    """Makes `--help` list the flags of this module, as absl does for those that the script itself defines."""
    for flag in FLAGS.flags_by_module_dict()[__name__]:
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def parse_flags(argv, program=None):
    """Parses a command line; a wrong flag ends the process with one line and status 2."""
    argv = ["--list_recipes=" if argument == "--list_recipes" else argument for argument in argv]
    try:
        rest = FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"every argument must be a flag, --name=value. Received: {' '.join(rest[1:])}")
        return rest
    except (flags.Error, ValueError) as error:  # ValueError: --noname=value
        text = " ".join(str(error).split())
        text = text if len(text) < MOST_OF_AN_ERROR else f"{text[:MOST_OF_AN_ERROR]} ..."  # of a value of thousands of digits
        print(f"{program or program_of(argv)}: {text} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def recipe_from_flags():
    """Returns the recipe with the flags' values in it, its name, and the dict of overridden values."""
    if FLAGS.recipe and FLAGS.recipe_file:
        received = f"{FLAGS.recipe!r}, {FLAGS.recipe_file!r}"
        raise InputError(f"--recipe and --recipe_file must not both be given. Received: {received}")
    if FLAGS.recipe_file:
        name, recipe = read_recipe(FLAGS.recipe_file)
    else:
        name = FLAGS.recipe or DEFAULT_RECIPE
        recipe = find_preset(name).recipe
    given = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(recipe, **given).check(), name, given


def default_workdir(name, given):
    if FLAGS.recipe_file:  # many files may hold recipes of the same name
        path = pathlib.Path(FLAGS.recipe_file).absolute()
        name = f"{path.parent.name}-{path.stem}"
    values = (f"{key}={str(value).replace('/', '_')}" for key, value in given.items())
    folder = "-".join([name, *values])
    if len(folder.encode()) > LONGEST_NAME:
        folder = f"{name}-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"
    return pathlib.Path("runs", folder)


def list_recipes():
    """Prints two or three lines for each recipe: purpose, accuracy in the paper and measured, and its flags."""
    for name, preset in RECIPES.items():
        if name.endswith("_l2"):
            continue
        reached = [f"paper, %: {preset.paper}"] if preset.paper else []
        if RESULTS.is_dir():  # an installed package is without the results
            reached.append(f"measured: {measured(name, preset)}")
            reached.append(f"{name}_l2: {measured(f'{name}_l2', RECIPES[f'{name}_l2'])}")
        say(f"{name}: {preset.about}")
        if reached:
            say(f"    {'; '.join(reached)}")
        say(f"    differs from the defaults in {' '.join(Preset(Recipe(), '').changes(preset.recipe.to_json()))}")
    say("NAME_l2 is a recipe's baseline, with the same data and steps: He initialization, L2 and SGD.")


def measured(name, preset):
    """Returns what the committed results of a recipe say: accuracy and time, that it diverged, or a shorter run's accuracy."""

    def committed(pattern, but=()):
        results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
        return [result for result in results if preset.gave(result, but)]

    results = committed(f"recipes/{name}-seed*.json")
    ended = [result for result in results if "diverged" not in result]
    lost = [result["diverged"] for result in results if "diverged" in result]
    if ended:
        accuracy, seconds = (statistics.mean(result[key] for result in ended) for key in ("test_accuracy", "seconds"))
        figures = f"{100 * accuracy:.2f} % test accuracy, mean of {len(ended)} seed(s), {seconds:.0f} s of training"
        return f"{figures} on {hardware(ended[0]['device'])}{f', {len(lost)} diverged' if lost else ''}"
    if lost:
        return lost[0]
    shorter = committed("paper/*-seed?.json", SHORTER) if preset.recipe.max_steps else []
    shorter = [result for result in shorter if "diverged" not in result]
    if shorter:
        longest = max(shorter, key=lambda result: result["steps"])
        accuracy, share = 100 * longest["test_accuracy"], f"{longest['steps']:,} of {preset.recipe.max_steps:,} steps"
        return f"not yet at this length; {accuracy:.2f} % test accuracy after {share}, one seed"
    return "not yet"


def train(program):
    """Runs the recipe that the flags describe, exports the model, and prints what it reached."""
    recipe, name, given = recipe_from_flags()
    workdir = expanded(FLAGS.workdir or default_workdir(name, given))
    if FLAGS.export is not None:
        check_export(FLAGS.export, workdir / "final.keras")
    for value, ruler in recipe.without_effect().items():
        if value in given:
            say(f"{program}: --{value} has no effect with {ruler}", sys.stderr)
    machine = runtime.start(FLAGS.strategy, FLAGS.devices, FLAGS.jit_compile, FLAGS.deterministic, FLAGS.tf32)
    result = run(
        recipe,
        workdir,
        FLAGS.data_dir,
        name,
        machine,
        keep_checkpoints=FLAGS.keep_checkpoints,
        signal_every=FLAGS.signal_every,
        checkpoint_minutes=FLAGS.checkpoint_minutes,
    )
    if not machine.is_chief:
        return
    exported = deploy(workdir / "final.keras", FLAGS.export, result) if FLAGS.export else ""
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
    say(f"{', '.join(shown)}: {workdir}/result.json, curves.png, final.keras")
    if exported:
        say(exported)


def main(argv):
    """Runs the command whose flags are parsed; returns the exit status."""
    status, message = 0, ""
    try:
        if FLAGS.version:
            print(__version__)
        elif FLAGS.list_recipes:
            values = find_preset(FLAGS.list_recipes).recipe.to_json()
            print(" ".join(f"--{name}={value}" for name, value in values.items()))
        elif FLAGS.list_recipes is not None:
            list_recipes()
        else:
            train(program_of(argv))
    except (ImportError, InputError) as error:
        status, message = 2, str(error)
    except (NonFiniteLossError, WorkerLostError) as error:
        status, message = 1, str(error)
    except Interrupted as error:
        status, message = 128 + error.signum, f"{error}; the same command resumes from there"
    except KeyboardInterrupt:
        status, message = 128 + signal.SIGINT, "stopped; the same command resumes from the last checkpoint"
    if message:
        say(f"{program_of(argv)}: {message}", sys.stderr)
    return status
