"""Writes the figures of the pages (README.md here and at the top, docs/evidence.md) from the result files: tables and pictures.

python benchmarks/pages.py            writes them
python benchmarks/pages.py --check    ends with status 1 if a page does not say what the result files say
"""

import json
import re
import shlex
import statistics
import sys

from ablation import ARMS, RUNGS, SEARCH_SEED
from absl import app, flags
from costs import cost_tables
from paper_cells import Table
from runs import ROOT, quality, table

from ortho_keras.diagnosis.plots import new_figure, save
from ortho_keras.trainer.recipes import RECIPES
from ortho_keras.trainer.result import hardware

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results"
TEST_HEADER = ("test accuracy, % (mean ± deviation, seeds)", "with mirror images, %")
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "evidence.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "tables.md",
)
# What docs/evidence.md shows of two long tables; benchmarks/tables.md has all of them.
TELLING_ARMS = ("he_l2", "orthonormal_init_l2", "orthonormal", "paper", "anchor", "relu_shift", "dirac")
TELLING_ARMS += ("relu_shift_dirac", "relu_shift_dirac_l2", "residual_l2", "residual_orthonormal")
TELLING_STARTS = ("He initialization, ReLU", "orthonormal, ReLU", "delta-orthonormal, ReLU", "Dirac, ReLU", "Dirac, max(x, -1)")
TELLING_STARTS += tuple(f"orthonormal, max(x, -{shift})" for shift in (1, 2, 3))

flags.DEFINE_bool("check", False, "Compare only.")


def result_files(kind):
    """Yields the results of `recipes` or `trials`: path and content."""
    for path in sorted((RESULTS / kind).glob("*.json")):
        yield path, json.loads(path.read_text())


def load_recipes():
    """Returns `{recipe: [result of each seed]}`; a result of values that the recipe has no longer ends the script."""
    runs = {}
    for path, result in result_files("recipes"):
        name = path.stem.rpartition("-seed")[0]
        if not RECIPES[name].gave(result):
            sys.exit(f"{path.relative_to(ROOT)} is of other values than the recipe has: measure it again, or delete it")
        runs.setdefault(name, []).append(result)
    return runs


def load_ablation(folder):
    """Returns `{depth: {arm: {rate: {seed: result}}}}`."""
    runs = {}
    for path in sorted(folder.glob("*.json")):
        arm, depth, rate, seed = re.fullmatch(r"(.+)-depth(\d+)-rate(.+)-seed(\d+)", path.stem).groups()
        rates = runs.setdefault(int(depth), {}).setdefault(arm, {})
        rates.setdefault(float(rate), {})[int(seed)] = json.loads(path.read_text())
    return dict(sorted(runs.items()))


def spread(values):
    """`mean ± deviation (count)` of shares, in percent."""
    values = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} ({len(values)})"


def mean_cell(results, name="test_accuracy"):
    """`mean ± deviation (count)` of a value that all runs have which did not diverge; for test accuracy, how many diverged."""
    values = [result.get(name) for result in results if "diverged" not in result]
    cell = [] if None in values or not values else [spread(values)]
    diverged = len(results) - len(values) if name == "test_accuracy" else 0
    return " ".join([*cell, *([f"{diverged} diverged"] if diverged else [])])


def recipes_table(runs):
    rows = []
    for name, results in runs.items():
        errors = [max(result["orthonormality_error"].values()) for result in results if "diverged" not in result]
        cells = [mean_cell(results), mean_cell(results, "test_mirrored_accuracy"), f"{max(errors):.2g}" if errors else ""]
        rows.append([f"`{name}`", results[0]["recipe"]["depth"], *cells])
    return table(["recipe", "layers", *TEST_HEADER, "largest \\|WᵀW − I\\|"], rows)


def trials_table():
    """One row for each trial: a recipe, the values in which the trial differs from it as it is now, and what came out."""
    runs = {}
    for path, result in result_files("trials"):
        flags = " ".join(RECIPES[result["recipe_name"]].changes(result["recipe"] | {"seed": 0}))  # as every preset's
        if not flags:
            sys.exit(f"{path.relative_to(ROOT)} is of the recipe's own values: it belongs in results/recipes")
        runs.setdefault((result["recipe_name"], flags), []).append(result)
    rows = []
    for (name, flags), results in sorted(runs.items(), key=lambda item: item[0][0]):
        accuracies = [mean_cell(results, f"{kind}_accuracy") for kind in ("validation", "test", "test_mirrored", "training")]
        rows.append([f"`{name}`", f"`{flags}`", *accuracies, ", ".join(sorted({result["commit"][:10] for result in results}))])
    header = ["recipe", "differs in", "validation accuracy, %", *TEST_HEADER, "training accuracy, %", "commit"]
    return table(header, rows)


def conditions(runs):
    every = [result for results in runs.values() for result in results if "diverged" not in result]
    devices = {hardware(r["device"]) for r in every}
    versions = {f"TensorFlow {r['versions']['tensorflow']}, Keras {r['versions']['keras']}" for r in every}
    commits = sorted({r["commit"][:10] for r in every})
    return (
        f"Measured on {'; '.join(sorted(devices))}; {'; '.join(sorted(versions))}; commits {', '.join(commits)}. "
        "Each row's command and time are in its result file, `benchmarks/results/recipes/<recipe>-seed<seed>.json`."
    )


def chosen(rates):
    """Returns the best rate of an arm's search and that run's result, or `None` twice, and the results of the other seeds."""
    searched = {rate: seeds[SEARCH_SEED] for rate, seeds in rates.items() if SEARCH_SEED in seeds}
    best = max(searched, key=lambda rate: quality(searched[rate]), default=None)
    return best, searched.get(best), [r for seed, r in sorted(rates.get(best, {}).items()) if seed != SEARCH_SEED]


def ablation_table(runs, arms=tuple(ARMS)):
    """One row for each arm: what it reaches at each depth with the learning rate chosen for it there."""
    rows = []
    for name in arms:
        cells = []
        for depth in runs:
            best, search, finals = chosen(runs[depth].get(name, {}))
            if finals:
                cells.append(f"{mean_cell(finals)} at {best:g}")
            else:
                cells.append(f"(search only: validation {100 * quality(search)[0]:.2f} at {best:g})" if search else "")
        if any(cells):
            rows.append([f"`{name}`", ARMS[name].about, ARMS[name].source, *cells])
    return table(["arm", "what it is", "whose", *(f"{depth} layers" for depth in runs)], rows)


def ablation_conditions(rung, runs):
    every = [r for arms in runs.values() for rates in arms.values() for seeds in rates.values() for r in seeds.values()]
    finished = [result for result in every if "diverged" not in result]
    steps = sorted({result["steps"] for result in finished})
    commits = sorted({result["commit"][:10] for result in every})
    rates = sorted({rate for arms in runs.values() for arm in arms.values() for rate in arm})
    rates = ", ".join(f"{rate:g}" for rate in rates)
    return (
        "Test accuracy, % (mean ± deviation, seeds; or the search's one run on validation images), at the learning rate chosen "
        f"of {rates} (each times 44 / layers) by the validation accuracy of seed {SEARCH_SEED}. "
        f"`train.py {' '.join(RUNGS[rung])}` and the arm's values; "
        f"{', '.join(map(str, steps))} steps; "
        f"commits {', '.join(commits)}; each run's command is in its file in `benchmarks/results/ablation/{rung}`."
    )


def initialization_table(shown=lambda row: True):
    kept = json.loads((RESULTS / "initialization.json").read_text())
    rows = [
        [
            f"{row['dataset']} {row['image_size']}x{row['image_size']}",
            row["depth"],
            row["net"],
            f"{row['per_layer']:.3f}",
            f"{row['total']:.2g}",
            f"{100 * row['image_share']:.2g} %",
        ]
        for row in kept["rows"]
        if shown(row)
    ]
    return table(["data", "layers", "net", "gradient's growth per layer", "over the network", "lowest image share"], rows)


def search_tables():
    """What each search found: the recipe itself (the first trial) and the best, over fresh seeds; and what mattered."""
    rows, mattered = [], []
    for path in sorted((RESULTS / "search").glob("*.json")):
        if re.search(r"-(base|best)(-full)?-seed\d+$", path.stem):
            continue
        report = json.loads(path.read_text())
        base, best = (shlex.split(report[f"{arm}_command"]) for arm in ("base", "best"))
        for arm, number, what in (
            ("base", 1, f"the recipe itself: `{' '.join(base[1:])}`"),
            ("best", report["best"], f"`{' '.join(flag for flag in best if flag not in base)}`"),
        ):
            trial = report["trials"][number - 1]
            reached = []
            for kind in ("", "-full"):
                runs = [json.loads(run.read_text()) for run in sorted(path.parent.glob(f"{path.stem}-{arm}{kind}-seed*.json"))]
                reached.append(mean_cell(runs))
            rows.append([path.stem, number, what, f"{100 * trial['score']:.2f}", f"{trial['crossentropy']:.4f}", *reached])
        states = [trial["state"] for trial in report["trials"]]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        parts = [f"{name} {share:.2f}" for name, (share, _) in report["importance"].items()]
        mattered.append(
            [path.stem, f"{len(states)} ({counts})", "; ".join(parts), f"`{report['command']}`", report["commit"][:10]]
        )
    header = ["search", "trial", "what", "validation accuracy, %", "cross-entropy"]
    header += ["test accuracy, % (fresh seeds)", "the same in the recipe's own epochs"]
    return {
        "search": table(header, rows),
        "search importance": table(["search", "trials", "importance", "command", "commit"], mattered),
    }


def draw_recipes(runs):
    """Draws training and validation accuracy of `digits` and its control over the steps, each seed a line."""
    figure, panels = new_panels(9, 3.6, 2)
    for axes, name, title in zip(panels, ("accuracy", "validation_accuracy"), ("training accuracy", "validation accuracy")):
        for recipe, color in (("digits", "tab:blue"), ("digits_l2", "tab:orange")):
            ended = [result for result in runs.get(recipe, []) if "diverged" not in result]
            for index, result in enumerate(ended):
                draw_line(axes, result, name, color, recipe if index == 0 else None)
        axes.set(title=title, xlabel="step", ylim=(0, 1.02))
    panels[0].legend(loc="lower right")
    figure.suptitle("44 layers without shortcuts on handwritten digits: our recipe, and its L2 baseline")
    save(figure, RESULTS / "digits.png")


def draw_ablation(rung, runs):
    """Draws the training accuracy of each arm over the steps, a panel for each depth, the chosen rate's seeds as lines."""
    from matplotlib import colormaps

    figure, panels = new_panels(5.5 * len(runs) + 2, 4.5, len(runs))
    colors = dict(zip(ARMS, [*colormaps["tab20"].colors, *colormaps["tab20b"].colors], strict=False))
    for axes, (depth, arms) in zip(panels, runs.items()):
        for name in (name for name in ARMS if name in arms):
            finals = [result for result in chosen(arms[name])[2] if "diverged" not in result]
            for index, result in enumerate(finals):
                draw_line(axes, result, "accuracy", colors[name], name if index == 0 else None)
        axes.set(title=f"{depth} layers", xlabel="step", ylim=(0, 1.02))
    panels[0].set_ylabel("training accuracy")
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    if not handles:
        return  # nothing but searches so far
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    save(figure, RESULTS / f"ablation_{rung}.png")


def new_panels(width, height, count):
    figure = new_figure(width, height)
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def draw_line(axes, result, name, color, label):
    points = [(s, v) for s, v in zip(result["history"]["step"], result["history"][name]) if v is not None]
    axes.plot(*zip(*points), color=color, label=label, linewidth=1.2)


def fill(text, contents):
    """Puts each content between its markers, wherever a page has them; returns the text and the names that it has."""
    found = []
    for name, content in contents.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
        found += [name] * count
    return text, found


def main(_):
    recipes = load_recipes()
    contents = {"recipes": recipes_table(recipes), "conditions": conditions(recipes)}
    contents |= {"all initializations": initialization_table()}
    contents |= {"initialization": initialization_table(lambda row: row["depth"] == 110 and row["net"] in TELLING_STARTS)}
    contents |= {"trials": trials_table(), "paper": Table().by_depth(), "paper runs": Table().runs()}
    contents |= cost_tables(RESULTS)
    contents |= search_tables() if (RESULTS / "search").exists() else {}
    folders = {rung: RESULTS / "ablation" / rung for rung in RUNGS}
    rungs = {rung: load_ablation(folder) for rung, folder in folders.items() if folder.exists()}
    for rung, runs in rungs.items():
        contents |= {
            f"ablation {rung}": ablation_table(runs, TELLING_ARMS),
            f"all arms of {rung}": ablation_table(runs),
            f"ablation {rung} conditions": ablation_conditions(rung, runs),
        }
    status, shown = 0, []
    for page in PAGES:
        before = page.read_text()
        text, found = fill(before, contents)
        shown += found
        if FLAGS.check and text != before:
            print(
                f"{page.relative_to(ROOT)} does not say what the result files say: run python benchmarks/pages.py",
                file=sys.stderr,
            )
            status = 1
        elif not FLAGS.check:
            page.write_text(text)
    for name in contents:
        if name not in shown:
            print(f"a page must hold <!-- {name} --> and <!-- /{name} -->. Received: none does", file=sys.stderr)
            status = 1
    if not FLAGS.check:
        draw_recipes(recipes)
        for rung, runs in rungs.items():
            draw_ablation(rung, runs)
    return status


if __name__ == "__main__":
    app.run(main)
