"""The scripts of benchmarks/, each run through its main at a tiny size, and the tables that pages.py makes of their results."""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import math
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from absl.testing import flagsaver
from command_lines import ROOT, script

from ortho_keras.trainer import command
from ortho_keras.trainer.recipes import RECIPES

ONE = ("--depth=8", "--image_size=8", "--batch_size=4", "--rounds=1")


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Python processes that a script starts are calls in this one instead: train.py's, or the script's own with other flags."""
    run = subprocess.run

    def call(words, **options):
        if words[0] != sys.executable:
            return run(words, **options)
        path, *arguments = map(str, words[1:])
        capsys.readouterr()
        if pathlib.Path(path).name == "train.py":
            held = dict(vars(command.flags.FLAGS))
            vars(command.flags.FLAGS).update(TRAIN_FLAGS)
            with flagsaver.flagsaver():
                status = command.main(command.parse_flags(["train.py", *arguments]))
            vars(command.flags.FLAGS).update(held)
        else:
            with script(monkeypatch, pathlib.Path(path).relative_to(ROOT), *arguments) as module:
                status = module.main(None) or 0
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, out, err)

    monkeypatch.setattr(subprocess, "run", call)
    monkeypatch.setattr(concurrent.futures, "ThreadPoolExecutor", InTurn)


class InTurn(contextlib.AbstractContextManager):
    """An executor in the main thread, where alone a run can handle signals."""

    def __init__(self, jobs):
        self.jobs = jobs

    def __exit__(self, *_):
        pass

    def map(self, function, tasks):
        return map(function, tasks)


TRAIN_FLAGS = dict(vars(command.flags.FLAGS))


def results(monkeypatch, name, *arguments, folder=None):
    """Runs `main` of a script and returns the content of the one result file that it wrote."""
    with script(monkeypatch, f"benchmarks/{name}.py", *arguments, *([f"--results={folder}"] if folder else ())) as module:
        assert not module.main(None)
    keras.config.set_dtype_policy("float32")
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_the_ablation_searches_a_rate_runs_the_seeds_and_makes_a_table(tmp_path, monkeypatch, in_process):
    given = ["--rung=smoke", "--depths=8", "--arms=he_l2", "--rates=0.03,1e30", "--seeds=0", f"--runs={tmp_path / 'runs'}"]
    given.append(f"--results={tmp_path / 'results'}")

    def run():
        with script(monkeypatch, "benchmarks/ablation.py", *given) as module:
            assert module.main(None) == 0

    run()
    names = [f"he_l2-depth8-rate{rate}-seed{seed}" for rate, seed in (("1e30", 100), ("0.03", 100), ("0.03", 0))]
    diverged, searched, final = (tmp_path / "results" / "smoke" / f"{name}.json" for name in names)
    lost = json.loads(diverged.read_text())
    assert lost["diverged"].startswith("the loss became ") and lost["recipe"]["learning_rate"] == 1e30
    assert lost["recipe_name"] == "digits"
    result = json.loads(final.read_text())
    values = {"initializer": "he_normal", "regularizer": "l2", "learning_rate": 0.03, "seed": 0}
    assert values.items() <= result["recipe"].items()
    assert result["command"].startswith("python train.py --recipe=digits ")
    assert len(result["commit"].removesuffix("-dirty")) == 40 and not list((tmp_path / "runs" / "smoke").iterdir())
    written = [path.stat().st_mtime_ns for path in (diverged, searched, final)]
    run()
    assert [path.stat().st_mtime_ns for path in (diverged, searched, final)] == written
    with script(monkeypatch, "benchmarks/pages.py") as pages:
        shown = pages.ablation_table(pages.load_ablation(tmp_path / "results" / "smoke")).splitlines()
    assert shown[0] == "| arm | what it is | whose | 8 layers |"
    assert shown[2].startswith("| `he_l2` | He initialization, L2 | ") and shown[2].endswith(" (1) at 0.03 |")


def test_the_ablation_refuses_unknown_arms(tmp_path, monkeypatch, capsys):
    with script(monkeypatch, "benchmarks/ablation.py", "--arms=he_l2,magic", f"--results={tmp_path}") as module:
        assert module.main(None) == 2
    err = capsys.readouterr().err
    assert "--arms must be among he_l2, " in err and "Received: magic" in err and not list(tmp_path.iterdir())


def test_the_papers_table_of_no_results(monkeypatch, tmp_path):
    given = ["benchmarks/paper.py", "--table", f"--results={tmp_path}"]
    table = subprocess.run([sys.executable, *given], cwd=ROOT, capture_output=True, text=True)
    assert table.returncode == 0 and "| `he_l2` |" in table.stdout, table.stderr
    with script(monkeypatch, *given) as module:
        cells = module.Table(tmp_path).searches("he_l2", 44, 1e-4)
        assert [cell.rate for cell in cells] == [0.1, 0.03, 0.01]
        name = "he_l2-depth44-factor0.0001-rate0.1-steps800-seed100"
        assert cells[0].name == name and cells[0].recipe("float32").max_steps == 800


@pytest.mark.parametrize(("given", "count"), [([], 3), (["--compare=regularizers", "--alone"], 9)])
def test_step_time_writes_the_ratio_of_its_arms(tmp_path, monkeypatch, given, count):
    result = results(monkeypatch, "step_time", *ONE, *given, folder=tmp_path)
    assert result["command"].startswith("python benchmarks/step_time.py --depth=8 ") and result["rounds"] == 1
    base, *others = result["arms"].values()
    assert base["ratio_quartiles"] == [1, 1, 1] and len(others) == count - 1
    for arm in others:
        quartiles = arm["ratio_quartiles"]
        assert quartiles == sorted(quartiles) and min(arm["median_seconds"], *quartiles) > 0


def test_onednn_serves_a_step_for_each_line(monkeypatch, capsys):
    """What each of its processes does; the processes themselves differ in a variable that TensorFlow reads once."""
    with script(monkeypatch, "benchmarks/onednn.py", *ONE, "--serve") as module:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
        module.main(None)
    assert capsys.readouterr().out == "\n\n"


@pytest.mark.parametrize("reference", ["neighbour", "anchor"])
def test_the_straightforward_modulation_trains_the_same_weights_by_other_operations(monkeypatch, reference):
    rng = np.random.default_rng(0)
    batch, name = (rng.normal(size=(4, 8, 8, 3)).astype("float32"), np.arange(4)), f"modulation by the {reference}"
    with script(monkeypatch, "benchmarks/arms.py") as arms:
        found = arms.modulation_arms(arms.plain_net(14, (8, 8, 3)))
        weights, wide = [], []
        for arm in (f"OrthonormalRegularizer and {name}", f"OrthonormalRegularizer and {name}, straightforward"):
            model, _ = found[arm]()
            for layer in model.layers:
                if isinstance(layer, keras.layers.Conv2D):
                    layer.kernel.assign(layer.kernel * 3)  # the errors of neighbours differ
            step = arms.training_step(model)
            step(*batch)
            operations = step.trace(*batch).graph.get_operations()
            wide.append(sum(op.type == "L2Loss" and op.inputs[0].dtype == "float64" for op in operations))
            weights.append(model.get_weights())
    assert wide == [0, 14]
    for mine, theirs in zip(*weights):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_measurements_of_a_gpu_run_at_small_sizes_on_a_processor(tmp_path, monkeypatch, in_process):
    with script(monkeypatch, "benchmarks/gpu.py", "--small", f"--results={tmp_path}") as module:
        assert not module.main(None)
    keras.config.set_dtype_policy("float32")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    step = "step_time/method-plain8-8-4-float32"
    device = found[-1].removeprefix(f"{step}_xla-")
    names = ["inference/8-8", "loop/plain8-8-4", "memory/plain8-8-4-float32", step, f"{step}_xla"]
    assert found == [f"{name}-{device}" for name in names]
    with script(monkeypatch, "benchmarks/costs.py") as module:
        assert "float32, XLA" in module.summary_table(tmp_path)
        lines = module.step_time_table(tmp_path).splitlines()  # four arms, and a column for each of the two
        assert len(lines) == 2 + 4 and {line.count(" | ") for line in lines[2:]} == {2} and lines[2].count(" ms |") == 2
    first, *others = json.loads((tmp_path / f"memory/plain8-8-4-float32-{device}").read_text())["arms"].values()
    assert first["ratio"] == 1 and all(1e8 < arm["peak_bytes"][0] < 1e11 for arm in others)


def test_scaling_fits_an_exponent(tmp_path, monkeypatch, in_process):
    arms = results(monkeypatch, "scaling", "--depths=8,14", "--steps=1", "--batch_size=4", folder=tmp_path)["arms"]
    for arm in arms.values():
        shallow, deep = arm["rows"]
        for name, exponent in arm["exponents"].items():  # through two points the fit is exact
            expected = math.log(deep[name] / shallow[name]) / math.log(14 / 8)
            assert abs(exponent - expected) < 1e-3 and shallow[name] > 0


def test_orthogonality_falls_with_the_factor(tmp_path, monkeypatch):
    given = ["--depth=8", "--steps=40", "--factors=1e-3,1", "--seeds=0", "--arms=OrthonormalRegularizer"]
    weak, strong = results(monkeypatch, "orthogonality", *given, folder=tmp_path)["rows"]
    assert strong["residuals"][0] < 0.2 * weak["residuals"][0] and min(weak["accuracies"] + strong["accuracies"]) > 0.4


def test_input_pipeline_writes_its_rates(tmp_path, monkeypatch):
    given = ["--depth=8", "--images=256", "--files=256", "--batches=2", "--repeats=1"]
    for rates in results(monkeypatch, "input_pipeline", *given, folder=tmp_path)["pipelines"].values():
        ratio = rates["pipeline_images_per_second"] / rates["step_images_per_second"]
        assert abs(rates["ratio_quartiles"][1] / ratio - 1) < 0.05


def test_backends_writes_its_ratios(tmp_path, monkeypatch, in_process):
    result = results(monkeypatch, "backends", *ONE, "--backends=tensorflow", folder=tmp_path)
    assert result["backend"] == "tensorflow" and result["arms"]["L2"]["ratio_quartiles"] == [1, 1, 1]
    assert len(result["arms"]) == 4 and all(arm["median_seconds"] > 0 for arm in result["arms"].values())


def test_lazy_writes_times_and_residuals(tmp_path, monkeypatch):
    given = ["--net=plain8", "--dataset=digits", "--turns=3", "--penalty_factor=1"]
    result = results(monkeypatch, "lazy", *given, folder=tmp_path)
    assert result["arms"]["L2"]["ratio_quartiles"] == [1, 1, 1] and result["steps"] == 30
    residuals = [arm["residual"] for arm in result["arms"].values()]
    assert max(residuals[1:]) < 0.5 * residuals[0] and len(set(residuals)) == 4


def test_loop_writes_its_ratios(tmp_path, monkeypatch):
    given = ["--batch_size=8", "--images=24", "--rounds=1"]
    ratios = results(monkeypatch, "loop", *given, folder=tmp_path)["ratios"]
    assert set(ratios) == {"one call of a graph for the epoch", "fit"}
    for own in ratios.values():  # quartiles of one round
        low, ratio, high = own["ratio_quartiles"]
        assert low == ratio == high > 0 and own["loop_images_per_second"] > 0


def test_photographs_writes_the_rate_of_each_way(tmp_path, monkeypatch):
    ways = results(monkeypatch, "photographs", "--files=512", "--repeats=1", folder=tmp_path)["ways"]
    whole = ways["whole files, decoded"]["images_per_second"]
    assert len(ways) == 7 and whole > 0
    for rates in ways.values():  # quartiles of one round, with three digits after the point
        low, ratio, high = rates["ratio_quartiles"]
        assert low == ratio == high and abs(ratio / (rates["images_per_second"] / whole) - 1) < 0.02


def test_inference_counts_what_a_shortcut_keeps_in_memory(tmp_path, monkeypatch):
    given = ["--depth=8", "--image_size=8", "--batches=3", "--rounds=2"]
    rows = {row["arm"]: row for row in results(monkeypatch, "inference", *given, folder=tmp_path)["rows"]}
    one = 3 * 8 * 8 * 16 * 4  # a tensor of the first stage, in bytes: a convolution has its input and its output
    counted = [rows[arm]["peak_activation_bytes"] for arm in ("plain", "plain, folded", "residual, folded")]
    assert counted == [2 * one, 2 * one, 3 * one] and rows["residual, folded"]["ratio_quartiles"] == [1, 1, 1]
    channels = 3 * 16 + 2 * 32 + 2 * 64  # gamma, beta and two averages become one bias
    assert rows["plain"]["parameters"] - rows["plain, folded"]["parameters"] == 3 * channels


@pytest.mark.parametrize(
    ("depth", "read", "path", "message"),
    [
        (8, "load_recipes", "recipes/digits-seed5.json", "is of other values than the recipe has"),
        (44, "trials_table", "trials/digits-seed5.json", "is of the recipe's own values: it belongs in results/recipes"),
    ],
)
def test_pages_refuse_a_result_in_the_wrong_folder(tmp_path, monkeypatch, depth, read, path, message):
    recipe = dataclasses.replace(RECIPES["digits"].recipe, depth=depth, seed=5).to_json()
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(json.dumps({"recipe_name": "digits", "seed": 5, "recipe": recipe}))
    with script(monkeypatch, "benchmarks/pages.py") as pages, pytest.raises(SystemExit, match=f"{path} {message}"):
        pages.ROOT = pages.RESULTS = tmp_path
        getattr(pages, read)()


def test_a_trial_is_a_real_run_kept_apart_from_the_recipe_with_what_was_changed(tmp_path, monkeypatch):
    """`train.py` is a process here, as all runs of the benchmarks are."""
    values = ["crop_border=1", "depth=8", "width=2", "epochs=1"]
    given = ["--recipes=digits", f"--values={','.join(values)}", "--seeds=3", f"--runs={tmp_path / 'runs'}"]
    with script(monkeypatch, "benchmarks/recipes.py", *given, f"--results={tmp_path}") as module:
        module.main(None)
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["trials"]
    (path,) = (tmp_path / "trials").iterdir()
    result = json.loads(path.read_text())
    changed = " ".join(f"--{value}" for value in values)
    assert result["command"] == f"python train.py --recipe=digits {changed} --seed=3" and result["steps"] == 20
    lost = {"diverged": "the loss became nan at step 2 of 20", "recipe": result["recipe"] | {"seed": 4}}
    path.with_name("lost.json").write_text(json.dumps({name: result[name] for name in ("commit", "recipe_name")} | lost))
    with script(monkeypatch, "benchmarks/pages.py") as pages:
        pages.RESULTS = tmp_path
        row = [cell.strip() for cell in pages.trials_table().splitlines()[-1].strip("|").split("|")]
    validation, test, training = (f"{100 * result[f'{name}_accuracy']:.2f} (1)" for name in ("validation", "test", "training"))
    assert row == ["`digits`", f"`{changed}`", validation, f"{test} 1 diverged", "", training, result["commit"][:10]]
