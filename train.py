"""Trains a recipe: flags in; result.json, curves.png and final.keras out. `python train.py --help` lists the flags."""

import dataclasses
import json
import os
import pathlib
import signal
import statistics
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's notes on what its build could do

from absl import app, flags

from ortho_keras.errors import InputError, Interrupted, NonFiniteLossError
from ortho_keras.experiment import run
from ortho_keras.recipes import RECIPES, Recipe, find_preset

FLAGS = flags.FLAGS
RESULTS = pathlib.Path(__file__).resolve().parent / "benchmarks" / "results" / "recipes"

flags.DEFINE_string("recipe", "digits", "A frozen set of values, see --list_recipes. The flags below override its values.")
flags.DEFINE_bool("list_recipes", False, "Print the recipes, with what each reaches and in how long, and end.")
flags.DEFINE_string("workdir", "", "Folder of the run; by default runs/<recipe>, with the overridden values behind.")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
for _field in dataclasses.fields(Recipe):
    _choices = _field.metadata["choices"]
    _among = f" ({' | '.join(_choices)})" if _choices else ""
    _help = f"{_field.metadata['help']}{_among}. By default the recipe's value."
    _DEFINE[_field.type](_field.name, None, _help)


def recipe_from_flags():
    """Returns the recipe with the flags' values in it, and the values that were overridden, a dict."""
    recipe = find_preset(FLAGS.recipe).recipe
    given = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(recipe, **given).check(), given


def default_workdir(given):
    values = (f"{name}={str(value).replace('/', '_')}" for name, value in given.items())
    return pathlib.Path("runs", "-".join([FLAGS.recipe, *values]))


def list_recipes():
    for name, preset in RECIPES.items():
        print(f"{name}\n    {preset.about}")
        if preset.paper:
            print(f"    paper: {preset.paper} % test accuracy")
        results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-seed*.json"))]
        if results:
            accuracy = statistics.mean(result["test_accuracy"] for result in results)
            seconds = statistics.mean(result["seconds"] for result in results)
            print(
                f"    measured: {100 * accuracy:.2f} % test accuracy, mean of {len(results)} seed(s), in {seconds:.0f} s of "
                f"training on {results[0]['device']['cpu_cores']} x {results[0]['device']['processor']}"
            )
        else:
            print("    measured: not yet")
        print("    " + " ".join(f"--{key}={value}" for key, value in preset.recipe.to_json().items()))


def main(_):
    if FLAGS.list_recipes:
        list_recipes()
        return 0
    try:
        recipe, given = recipe_from_flags()
        workdir = FLAGS.workdir or default_workdir(given)
        result = run(recipe, workdir, FLAGS.data_dir, FLAGS.recipe)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"train.py: {error}; the same command goes on from there", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("train.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    print(
        f"test accuracy {result['test_accuracy']:.4f}, validation accuracy {result['validation_accuracy']:.4f}, "
        f"{result['steps']} steps in {result['seconds']:.0f} s: {workdir}/result.json, curves.png, final.keras"
    )
    return 0


def parse_flags(argv):
    """absl's parser, with an unknown or unreadable flag told in one line."""
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        print(f"train.py: {' '.join(str(error).split())} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)
    if len(rest) > 1:
        print(f"train.py: every argument must be a flag, --name=value. Received: {' '.join(rest[1:])}", file=sys.stderr)
        sys.exit(2)
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
