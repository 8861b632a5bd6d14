"""Reports a search, finished or not: its trials, the best one's recipe, and which values mattered.

python -m tuning.report runs/search-digits
"""

import dataclasses
import math
import pathlib
import shlex
import sys

import numpy as np

from ortho_keras.diagnosis.plots import new_figure, save
from ortho_keras.method.errors import InputError
from ortho_keras.method.files import write_json
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.recipes import RECIPES
from tuning.space import SPACE, Range
from tuning.trials import FAILED, FINISHED, HOPELESS, RUNNING, best_trial, read_search, read_trials

LEAST_TRIALS = 8  # fewer give importances that are mostly chance
SHOWN = {RUNNING: "unfinished"}


def report(directory):
    """Returns the text of a search's report, and writes three files into its directory.

    `best.json` is a recipe for `train.py --recipe_file`, `search.png` a plot, `report.json` the report for scripts.

    Raises:
        InputError: If the directory holds no search.
    """
    directory = pathlib.Path(directory)
    search, trials = read_search(directory), read_trials(directory)
    names, best = list(search["parameters"]), best_trial(trials)
    counts = {state: sum(trial.state == state for trial in trials) for state in (FINISHED, HOPELESS, FAILED, RUNNING)}
    counted = ", ".join(f"{count} {SHOWN.get(state, state)}" for state, count in counts.items() if count)
    lines = [f"{directory}: {len(trials)} trials{f' ({counted})' if counted else ''}", "", *trials_table(trials, names), ""]
    if best is None:
        return "\n".join([*lines, "no trial has finished yet, so there is no best one"])
    recipes = {"base": Recipe.from_json(search["base"]), "best": best.recipe}
    commands = {name: command(search["recipe_name"], own, search.get("train_flags", ())) for name, own in recipes.items()}
    found = importance(trials, names)
    write_json(directory / "best.json", {"recipe_name": search["recipe_name"], "recipe": best.recipe.to_json()})
    content = {"importance": found, "best": best.number, **{f"{name}_command": own for name, own in commands.items()}}
    write_json(directory / "report.json", {**search, **content, "trials": [dataclasses.asdict(trial) for trial in trials]})
    draw(trials, names, directory / "search.png")
    lines += [
        f"best: trial {best.number}, validation accuracy {best.score:.4f}",
        "",
        f"    {commands['best']}",
        f"    python train.py --recipe_file={shlex.quote(str(directory / 'best.json'))}",
        "",
        *importance_table(found, len(scored(trials))),
        "",
        f"{directory}/search.png shows each value against validation accuracy",
    ]
    return "\n".join(lines)


def command(name, recipe, train_flags=()):
    """Returns the `train.py` command of a recipe: a preset, `name` if there is one, and the values in which it differs."""
    name = name if name in RECIPES else next(iter(RECIPES))
    return shlex.join(["python", "train.py", f"--recipe={name}", *RECIPES[name].changes(recipe.to_json()), *train_flags])


def shown(trial, name):
    """Returns a trial's value as the tables show it; empty where it has no effect."""
    if name in trial.recipe.without_effect():
        return ""
    value = getattr(trial.recipe, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def trials_table(trials, names):
    """Returns the trials from the best to the worst, then those without a score, as lines."""
    rows = [["trial", "accuracy", "seconds", "epochs", *names, "state"]]
    for trial in sorted(trials, key=lambda trial: (trial.score is None, -(trial.score or 0), trial.number)):
        score = "" if trial.score is None else f"{trial.score:.4f}"
        state = SHOWN.get(trial.state, trial.state) + f": {trial.reason}" * bool(trial.reason)
        values = [shown(trial, name) for name in names]
        rows.append([str(trial.number), score, f"{trial.seconds:.0f}", str(trial.recipe.epochs), *values, state])
    return aligned(rows)


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def scored(trials):
    """Returns the trials with a score that trained longest: the scores of Hyperband's shorter ones do not compare."""
    trials = [trial for trial in trials if trial.score is not None]
    longest = max((trial.recipe.epochs for trial in trials), default=0)
    return [trial for trial in trials if trial.recipe.epochs == longest]


def kinds(values):
    """Returns the different texts among `values`: numbers in order, then words."""
    return sorted(set(values), key=lambda text: (math.isnan(_number(text)), np.nan_to_num(_number(text)), text))


def _number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


def importance(trials, names):
    """Returns `{name: (share, correlation)}`, the most important value first; empty where too few trials differ.

    The share is the value's permutation importance in a random forest, of the sum over all values. The correlation is
    Spearman's, of the score and the value; `None` where the value is no number.
    """
    from scipy.stats import spearmanr
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    trials = scored(trials)
    scores = np.array([trial.score for trial in trials])
    if len(trials) < LEAST_TRIALS or np.ptp(scores) == 0:
        return {}
    values = {name: [shown(trial, name) for trial in trials] for name in names}
    places = np.array([[kinds(own).index(value) for value in own] for own in values.values()], float).T
    forest = RandomForestRegressor(300, min_samples_leaf=2, random_state=0).fit(places, scores)
    raw = np.maximum(permutation_importance(forest, places, scores, n_repeats=20, random_state=0).importances_mean, 0)
    found = {}
    for index in np.argsort(-raw, kind="stable"):
        numbers = np.array([_number(value) for value in values[names[index]]])
        pairs = numbers[~np.isnan(numbers)], scores[~np.isnan(numbers)]
        vary = all(len(set(own)) > 1 for own in pairs)
        correlation = float(spearmanr(*pairs).statistic) if vary else None
        found[names[index]] = (float(raw[index] / (raw.sum() or 1)), correlation)
    return found


def importance_table(found, count):
    """Returns what `importance` found over `count` trials, as lines."""
    if not found:
        return [f"which values mattered: needs {LEAST_TRIALS} trials with different accuracies, there are {count}"]
    rows = [["value", "importance", "rank correlation"]]
    for name, (share, correlation) in found.items():
        rows.append([name, f"{share:.2f}", "" if correlation is None else f"{correlation:+.2f}"])
    return [f"which values mattered, over {count} trials (permutation importance in a random forest):", "", *aligned(rows)]


def draw(trials, names, path):
    """Plots validation accuracy against each hyperparameter, one panel each; hopeless trials are at the lower edge."""
    trials = scored(trials)
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(3.6 * columns, 3 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    finished = [trial.score for trial in trials if trial.state == FINISHED]
    edge = min(finished, default=0) - 0.05 * (np.ptp(finished or [0]) or 0.1)  # chance is far below
    for axes, name in zip(panels, names):
        continuous = isinstance(SPACE.get(name), Range)
        order = kinds([shown(trial, name) for trial in trials])
        for state, color, marker in ((FINISHED, "tab:blue", "o"), (HOPELESS, "tab:red", "v")):
            own = [trial for trial in trials if trial.state == state]
            at = [getattr(trial.recipe, name) if continuous else order.index(shown(trial, name)) for trial in own]
            axes.scatter(at, [max(trial.score, edge) for trial in own], 18, color, marker, alpha=0.7, label=state)
        if continuous:
            axes.set_xscale("log")
        else:
            axes.set_xticks(range(len(order)), [kind or "(off)" for kind in order], rotation=30, ha="right")
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supylabel("validation accuracy")
    if any(trial.state == HOPELESS for trial in trials):
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    save(figure, path)


def main(arguments):
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("tuning.report: usage: python -m tuning.report DIRECTORY_OF_A_SEARCH", file=sys.stderr)
        return 2
    try:
        print(report(arguments[0]))
    except InputError as error:
        print(f"tuning.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
