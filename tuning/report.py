"""Reports a search, at its end or at any time: its trials, the best one's recipe, and which values mattered.

python -m tuning.report runs/search-digits
"""

import dataclasses
import math
import pathlib
import shlex
import sys

import numpy as np

from ortho_keras.method.errors import InputError
from ortho_keras.method.files import write_json
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.recipes import RECIPES
from tuning.trials import FAILED, FINISHED, HOPELESS, RUNNING, best_trial, read_search, read_trials

LEAST_TRIALS = 8  # from which on importances are more than chance
SEED = 0


def report(directory):
    """Returns the text of a report, and writes into the directory what it says.

    `best.json` is a recipe for `train.py --recipe_file`, `search.png` the picture, `report.json` all of it for scripts.

    Raises:
        InputError: If the directory holds no search.
    """
    directory = pathlib.Path(directory)
    search, trials = read_search(directory), read_trials(directory)
    names = list(search["parameters"])
    counts = {state: sum(trial.state == state for trial in trials) for state in (FINISHED, HOPELESS, FAILED, RUNNING)}
    told = ", ".join(f"{count} {'unfinished' if state == RUNNING else state}" for state, count in counts.items() if count)
    lines = [f"{directory}: {len(trials)} trials{f' ({told})' if told else ''}", ""]
    lines += trials_table(trials, names)
    best = best_trial(trials)
    if best is None:
        return "\n".join([*lines, "", "no trial is finished yet: there is no best one"])
    write_json(directory / "best.json", {"recipe_name": search["recipe_name"], "recipe": best.recipe.to_json()})
    draw(trials, names, directory / "search.png")
    best_command = command(search["recipe_name"], best.recipe, search.get("train_flags", ()))
    content = {
        **search,
        "importance": importance(trials, names),
        "best": best.number,
        "base_command": command(search["recipe_name"], Recipe.from_json(search["base"]), search.get("train_flags", ())),
        "best_command": best_command,
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }
    write_json(directory / "report.json", content)
    lines += ["", f"best: trial {best.number}, validation accuracy {best.score:.4f}", ""]
    lines += [
        f"    {best_command}",
        f"    python train.py --recipe_file={shlex.quote(str(directory / 'best.json'))}",
    ]
    lines += ["", *importance_table(trials, names), "", f"{directory}/search.png shows each value against validation accuracy"]
    return "\n".join(lines)


def command(name, recipe, train_flags=()):
    """Returns the `train.py` command of a recipe: a preset, `name` if there is one, and the values in which it differs."""
    name = name if name in RECIPES else next(iter(RECIPES))
    return shlex.join(["python", "train.py", f"--recipe={name}", *RECIPES[name].changes(recipe), *train_flags])


def shown(trial, name):
    """A trial's value as the tables show it; empty where it says nothing."""
    if name in trial.recipe.without_effect():
        return ""
    value = getattr(trial.recipe, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def trials_table(trials, names):
    """The trials from the best to the worst, then those without a score, as lines."""
    order = sorted(trials, key=lambda trial: (trial.score is None, -(trial.score or 0), trial.number))
    rows = [["trial", "accuracy", "seconds", "epochs", *names, "state"]]
    for trial in order:
        state = "unfinished" if trial.state == RUNNING else trial.state
        rows.append(
            [
                str(trial.number),
                "" if trial.score is None else f"{trial.score:.4f}",
                f"{trial.seconds:.0f}",
                str(trial.recipe.epochs),
                *(shown(trial, name) for name in names),
                f"{state}: {trial.reason}" if trial.reason else state,
            ]
        )
    return aligned(rows)


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def scored(trials):
    """The trials that have a score, of the longest kind only: Hyperband's shorter ones are of another budget."""
    trials = [trial for trial in trials if trial.score is not None]
    longest = max((trial.recipe.epochs for trial in trials), default=0)
    return [trial for trial in trials if trial.recipe.epochs == longest]


def kinds(values):
    """The different texts among `values`: numbers in order, then words."""
    return sorted(set(values), key=lambda text: (_number(text) is None, _number(text) or 0, text))


def _number(text):
    try:
        return float(text)
    except ValueError:
        return None


def importance(trials, names):
    """Returns `{name: (share, correlation)}`: a random forest's importance by permutation, which sum up to 1, and the rank
    correlation of score and value, `None` where there are no numbers. Empty with too few trials to tell.
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
    forest = RandomForestRegressor(300, min_samples_leaf=2, random_state=SEED).fit(places, scores)
    raw = np.maximum(permutation_importance(forest, places, scores, n_repeats=20, random_state=SEED).importances_mean, 0)
    found = {}
    for index in np.argsort(-raw, kind="stable"):
        name = names[index]
        numbers = [(_number(value), score) for value, score in zip(values[name], scores) if _number(value) is not None]
        different = len({number for number, _ in numbers}) > 1 and len({score for _, score in numbers}) > 1
        correlation = float(spearmanr(*zip(*numbers)).statistic) if different else None
        found[name] = (float(raw[index] / (raw.sum() or 1)), correlation)
    return found


def importance_table(trials, names):
    """Which values mattered, as lines."""
    found, count = importance(trials, names), len(scored(trials))
    if not found:
        return [f"which values mattered: {LEAST_TRIALS} trials with different accuracies would tell, there are {count}"]
    rows = [["value", "importance", "rank correlation"]]
    for name, (share, correlation) in found.items():
        rows.append([name, f"{share:.2f}", "" if correlation is None else f"{correlation:+.2f}"])
    note = f"which values mattered, over {count} trials (importance: share of a random forest's, by permutation):"
    return [note, "", *aligned(rows)]


def draw(trials, names, path):
    """Draws validation accuracy against each hyperparameter, a panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trials = scored(trials)
    wide = min(4, len(names))
    high = math.ceil(len(names) / wide)
    figure = Figure(figsize=(3.6 * wide, 3 * high), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(high, wide, squeeze=False).ravel()
    for axes, name in zip(panels, names):
        continuous = name in ("learning_rate", "factor")
        order = kinds([shown(trial, name) for trial in trials])
        for state, color in ((FINISHED, "tab:blue"), (HOPELESS, "tab:red")):
            own = [trial for trial in trials if trial.state == state]
            at = [getattr(trial.recipe, name) if continuous else order.index(shown(trial, name)) for trial in own]
            axes.scatter(at, [trial.score for trial in own], s=18, color=color, alpha=0.7, label=state if own else None)
        if continuous:
            axes.set_xscale("log")
        else:
            turn = 30 if len("".join(order)) > 20 else 0
            axes.set_xticks(range(len(order)), [kind or "(off)" for kind in order], rotation=turn)
        axes.set(title=name, ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("validation accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower right", ncols=2)
    figure.savefig(path, dpi=110)


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("tuning.report: usage: python -m tuning.report DIRECTORY_OF_A_SEARCH", file=sys.stderr)
        return 2
    try:
        print(report(sys.argv[1]))
    except InputError as error:
        print(f"tuning.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
