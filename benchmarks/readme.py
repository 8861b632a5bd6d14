"""Writes the figures of README.md from the result files beside this script: tables between markers, and the picture.

python benchmarks/readme.py            writes them
python benchmarks/readme.py --check    ends with status 1 if README.md does not say what the result files say
"""

import json
import pathlib
import re
import statistics
import sys

from absl import app, flags

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "recipes"
README = ROOT / "README.md"
PICTURE = ROOT / "benchmarks" / "results" / "digits.png"

flags.DEFINE_bool("check", False, "Compare only.")


def load():
    """Returns `{recipe: [result of each seed]}`."""
    runs = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        runs.setdefault(result["recipe_name"], []).append(result)
    return runs


def recipes_table(runs):
    rows = [
        "| recipe | layers | test accuracy, % (mean ± deviation, seeds) | training, s | images/s | largest \\|WᵀW − I\\| |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, results in runs.items():
        accuracies = [100 * result["test_accuracy"] for result in results]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        seconds = statistics.mean(result["seconds"] for result in results)
        rate = statistics.mean(result["images_per_second"] for result in results)
        error = max(max(result["orthonormality_error"].values()) for result in results)
        rows.append(
            f"| `{name}` | {results[0]['recipe']['depth']} | {statistics.mean(accuracies):.2f}{spread} ({len(results)}) "
            f"| {seconds:.0f} | {rate:.0f} | {error:.2g} |"
        )
    return "\n".join(rows)


def conditions(runs):
    every = [result for results in runs.values() for result in results]
    devices = {f"{r['device']['cpu_cores']} cores of {r['device']['processor']}" for r in every}
    versions = {f"TensorFlow {r['versions']['tensorflow']}, Keras {r['versions']['keras']}" for r in every}
    commits = sorted({r["commit"][:10] for r in every})
    return (
        f"Measured on {'; '.join(sorted(devices))}; {'; '.join(sorted(versions))}; commits {', '.join(commits)}. "
        "Each row's command is in its result file, `benchmarks/results/recipes/<recipe>-seed<seed>.json`."
    )


def draw(runs):
    """Draws training and validation accuracy of `digits` and its control over the steps, each seed a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, title in zip(panels, ("accuracy", "validation_accuracy"), ("training accuracy", "validation accuracy")):
        for recipe, color in (("digits", "tab:blue"), ("digits_l2", "tab:orange")):
            for index, result in enumerate(runs.get(recipe, [])):
                points = [(s, v) for s, v in zip(result["history"]["step"], result["history"][name]) if v is not None]
                axes.plot(*zip(*points), color=color, label=f"{recipe}" if index == 0 else None)
        axes.set(title=title, xlabel="step", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    figure.suptitle("44 layers without shortcuts on handwritten digits: the method, and He initialization with L2")
    figure.savefig(PICTURE, dpi=110)


def main(_):
    runs = load()
    before = text = README.read_text()
    for name, content in (("recipes", recipes_table(runs)), ("conditions", conditions(runs))):
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
        if count != 1:
            print(f"README.md must hold <!-- {name} --> and <!-- /{name} --> once. Received: {count} times", file=sys.stderr)
            return 1
    if FLAGS.check:
        if text != before:
            print("README.md does not say what the result files say: run python benchmarks/readme.py", file=sys.stderr)
        return int(text != before)
    README.write_text(text)
    draw(runs)
    return 0


if __name__ == "__main__":
    app.run(main)
