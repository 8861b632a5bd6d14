"""The scripts of benchmarks/, as processes of their own: their flags are not train.py's."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest

from ortho_keras.trainer.recipes import RECIPES

ROOT = pathlib.Path(__file__).parents[2]


def ablation(folder, *arguments):
    places = [f"--results={folder / 'results'}", f"--runs={folder / 'runs'}"]
    command = [sys.executable, ROOT / "benchmarks" / "ablation.py", "--rung=smoke", "--depths=8", *arguments, *places]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_ablation_searches_a_rate_runs_the_seeds_goes_on_and_makes_a_table(tmp_path):
    arguments = ("--arms=he_l2", "--rates=0.03,1e30", "--seeds=0", "--jobs=2")
    done = ablation(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    files = {path.stem: path for path in (tmp_path / "results" / "smoke").iterdir()}
    diverged, searched, final = (
        f"he_l2-depth8-rate{rate}-seed{seed}" for rate, seed in (("1e30", 100), ("0.03", 100), ("0.03", 0))
    )
    assert set(files) == {diverged, searched, final}
    assert "the loss became" in json.loads(files[diverged].read_text())["diverged"]
    result = json.loads(files[final].read_text())
    assert {"initializer": "he_normal", "regularizer": "l2", "learning_rate": 0.03, "seed": 0}.items() <= result[
        "recipe"
    ].items()
    assert (
        result["command"].startswith("python train.py --recipe=digits ") and len(result["commit"].removesuffix("-dirty")) == 40
    )
    assert not list((tmp_path / "runs" / "smoke").iterdir())

    written = {path: path.stat().st_mtime_ns for path in files.values()}
    files[final].unlink()
    again = ablation(tmp_path, *arguments)
    assert again.stdout.count("\n") == 1 and again.stdout.startswith(final)
    assert all(path.stat().st_mtime_ns == at for path, at in written.items() if path != files[final])
    repeated = json.loads(files[final].read_text())
    assert abs(repeated["test_accuracy"] - result["test_accuracy"]) < 0.02

    table = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import pages, pathlib; "
        f"print(pages.ablation_table(pages.load_ablation(pathlib.Path({str(tmp_path / 'results' / 'smoke')!r}))))"
    )
    shown = subprocess.run([sys.executable, "-c", table], capture_output=True, text=True).stdout.splitlines()
    assert shown[0] == "| arm | what it is | whose | 8 layers |"
    reached = f"{100 * repeated['test_accuracy']:.2f} (1) at 0.03"
    assert shown[2:] == [f"| `he_l2` | He initialization, L2 | control | {reached} |"]


def test_what_the_ablation_refuses(tmp_path):
    unknown = ablation(tmp_path, "--arms=he_l2,magic")
    assert unknown.returncode == 2 and "--arms must be among he_l2, " in unknown.stderr and "Received: magic" in unknown.stderr
    wrong = ablation(tmp_path, "--arms=he_l2", "--rates=0")
    assert wrong.returncode == 1 and "--learning_rate must be more than 0" in wrong.stderr
    assert "Traceback" not in wrong.stderr and not (tmp_path / "results").exists()


def test_step_time_writes_the_ratio_of_its_arms(tmp_path):
    given = ["--depth=8", "--image_size=8", "--batch_size=4", "--rounds=3", f"--results={tmp_path}"]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "step_time.py", *given], check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert result["command"].startswith("python benchmarks/step_time.py --depth=8 ") and result["rounds"] == 3
    base, *others = result["arms"].values()
    assert base["ratio_quartiles"] == [1, 1, 1] and len(others) == 2
    for arm in others:
        assert (
            arm["ratio_quartiles"] == sorted(arm["ratio_quartiles"]) and min(arm["median_seconds"], *arm["ratio_quartiles"]) > 0
        )


def test_step_time_of_the_regularizers(tmp_path):
    given = ["--compare=regularizers", "--depth=8", "--image_size=8", "--batch_size=4", "--rounds=1", f"--results={tmp_path}"]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "step_time.py", *given], check=True, capture_output=True)
    (path,) = tmp_path.glob("regularizers-plain8-8-4-float32-*.json")
    arms = json.loads(path.read_text())["arms"]
    assert list(arms)[:2] == ["L2", "OrthonormalRegularizer"] and len(arms) == 10
    subprocess.run([sys.executable, ROOT / "benchmarks" / "step_time.py", *given, "--alone"], check=True, capture_output=True)
    (path,) = tmp_path.glob("penalties-plain8-8-4-float32-*.json")
    assert len(json.loads(path.read_text())["arms"]) == 9


def test_onednn_takes_its_arms_by_turns(tmp_path):
    given = ["--depth=8", "--image_size=8", "--batch_size=4", "--rounds=2", f"--results={tmp_path}"]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "onednn.py", *given], check=True, capture_output=True)
    (path,) = tmp_path.glob("plain8-8-4-float32-cores*.json")
    result = json.loads(path.read_text())
    assert result["command"].startswith("python benchmarks/onednn.py --depth=8 ") and result["rounds"] == 2
    base, on, off = result["arms"].values()
    assert base["ratio_quartiles"] == [1, 1, 1] and base["median_seconds"] > 0
    for arm in (on, off):
        low, median, high = arm["ratio_quartiles"]
        assert 0 < low <= median <= high


def test_memory_of_one_arm_and_the_ratio_of_all(tmp_path):
    given = ["--depth=8", "--image_size=8", "--batch_size=4", f"--results={tmp_path}"]
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", *given, "--arm=SRIPRegularizer"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert 1e8 < int(done.stdout) < 1e10 and not list(tmp_path.iterdir())


def test_scaling_fits_an_exponent(tmp_path):
    given = ["--depths=8,14", "--steps=1", "--batch_size=4", f"--results={tmp_path}"]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "scaling.py", *given], check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    for arm in json.loads(path.read_text())["arms"].values():
        shallow, deep = arm["rows"]
        for name, exponent in arm["exponents"].items():  # through two points the fit is exact
            expected = math.log(deep[name] / shallow[name]) / math.log(14 / 8)
            assert abs(exponent - expected) < 1e-3 and shallow[name] > 0


def test_orthogonality_falls_with_the_factor(tmp_path):
    given = ["--depth=8", "--steps=60", "--factors=1e-3,1", "--seeds=0", f"--results={tmp_path}"]
    given.append("--arms=L2,OrthonormalRegularizer,DoubleSoftOrthogonalRegularizer,OrthonormalDecay(every=1)")
    subprocess.run([sys.executable, ROOT / "benchmarks" / "orthogonality.py", *given], check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    residuals = {}
    for row in json.loads(path.read_text())["rows"]:
        residuals.setdefault(row["arm"], []).extend(row["residuals"])
        assert row["accuracies"][0] > 0.5
    for arm in ("OrthonormalRegularizer", "OrthonormalDecay(every=1)", "DoubleSoftOrthogonalRegularizer"):
        weak, strong = residuals[arm]
        assert strong < 0.2 * weak and strong < 0.2 * residuals["L2"][0]


def test_input_pipeline_writes_its_rates(tmp_path):
    given = ["--depth=8", "--images=256", "--files=256", "--batches=2", "--repeats=1", f"--results={tmp_path}"]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "input_pipeline.py", *given], check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    for figures in json.loads(path.read_text())["pipelines"].values():
        rates = figures["pipeline_images_per_second"], figures["step_images_per_second"]
        assert abs(figures["ratio_quartiles"][1] / (rates[0] / rates[1]) - 1) < 0.05


def test_photographs_writes_the_rate_of_each_way(tmp_path):
    given = ["--files=512", "--repeats=1", f"--results={tmp_path}"]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "photographs.py", *given], check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    ways = json.loads(path.read_text())["ways"]
    whole = ways["whole files, decoded"]["images_per_second"]
    assert len(ways) == 7 and whole > 0
    for figures in ways.values():  # of one round, so the quartiles are one value, written with three digits after the point
        ratio = figures["images_per_second"] / whole
        assert figures["ratio_quartiles"] == [figures["ratio_quartiles"][1]] * 3
        assert abs(figures["ratio_quartiles"][1] - ratio) < 0.0006 + 0.01 * ratio


def test_inference_counts_what_a_shortcut_keeps_alive(tmp_path):
    given = ["--depth=8", "--image_size=8", "--batches=3", "--rounds=2", f"--results={tmp_path}"]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "inference.py", *given], check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    rows = {row["arm"]: row for row in json.loads(path.read_text())["rows"]}
    one = 3 * 8 * 8 * 16 * 4  # a tensor of the first stage, in bytes: a convolution has its input and its output
    assert [rows[arm]["peak_activation_bytes"] for arm in ("plain", "plain, folded", "residual, folded")] == [
        2 * one,
        2 * one,
        3 * one,
    ]
    assert rows["residual, folded"]["ratio_quartiles"] == [1, 1, 1]
    channels = 3 * 16 + 2 * 32 + 2 * 64  # gamma, beta and two averages become one bias
    assert rows["plain"]["parameters"] - rows["plain, folded"]["parameters"] == 3 * channels


def read_pages(folder, call):
    """Runs a function of benchmarks/pages.py on result files in `folder`."""
    load = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import pages, pathlib; "
        f"pages.ROOT = pages.RESULTS = pathlib.Path({str(folder)!r}); {call}"
    )
    return subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("folder", "depth", "read", "message"),
    [
        ("recipes", 8, "load_recipes", "is of other values than the recipe has"),
        ("trials", 44, "trials_table", "is of the recipe's own values: it belongs in results/recipes"),
    ],
)
def test_pages_refuse_a_result_in_the_wrong_folder(tmp_path, folder, depth, read, message):
    recipe = dataclasses.replace(RECIPES["digits"].recipe, depth=depth, seed=5).to_json()
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "digits-seed5.json").write_text(json.dumps({"recipe_name": "digits", "seed": 5, "recipe": recipe}))
    done = read_pages(tmp_path, f"pages.{read}()")
    assert done.returncode == 1 and f"{folder}/digits-seed5.json {message}" in done.stderr


def test_pages_keep_original_images_and_others_apart(tmp_path):
    name = "plain44_cifar10_fast"
    told = {"recipe_name": name, "seed": 0, "recipe": RECIPES[name].recipe.to_json()}
    original = {**told, "data_sha256": "d852faa1b6a2fd15a9a6adc20af0501007f64b995b17e06d8f4009f86743625a"}
    other = {**told, "data_sha256": "0" * 64}
    paths = [tmp_path / folder / f"{name}-seed0.json" for folder in ("recipes", "jpeg_copy/recipes")]
    for path in paths:
        path.parent.mkdir(parents=True)

    def read(*contents):
        for path, content in zip(paths, contents, strict=True):
            path.write_text(json.dumps(content))
        return read_pages(tmp_path, "print(list(pages.load_recipes()))")

    assert read(original, other).stdout.strip() == f"[('{name}', 'original'), ('{name}', 'JPEG copy')]"
    for contents, message in (
        ((other, other), "recipes/plain44_cifar10_fast-seed0.json is of other images"),
        ((told, other), "recipes/plain44_cifar10_fast-seed0.json is of other images"),
        ((original, original), "jpeg_copy/recipes/plain44_cifar10_fast-seed0.json is of the original images"),
    ):
        done = read(*contents)
        assert done.returncode == 1 and message in done.stderr


def test_a_trial_is_kept_apart_from_the_recipe_and_tells_what_was_changed(tmp_path):
    values = ["crop_border=1", "depth=8", "width=2", "epochs=1"]
    script, places = ROOT / "benchmarks" / "recipes.py", [f"--results={tmp_path}", f"--runs={tmp_path / 'runs'}"]
    given = ["--recipes=digits", f"--values={','.join(values)}", "--seeds=3"]
    subprocess.run([sys.executable, script, *given, *places], check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["trials"]
    (path,) = (tmp_path / "trials").iterdir()
    result = json.loads(path.read_text())
    changed = " ".join(f"--{value}" for value in values)
    assert result["command"] == f"python train.py --recipe=digits {changed} --seed=3"
    assert result["recipe"]["crop_border"] == 1 and result["steps"] == 20
    done = read_pages(tmp_path, "print(pages.trials_table())")
    row = [cell.strip() for cell in done.stdout.strip().splitlines()[-1].strip("|").split("|")]
    shares = [f"{100 * result[name]:.2f} (1)" for name in ("validation_accuracy", "test_accuracy")]
    assert row == ["`digits`", "", f"`{changed}`", *shares, "", result["commit"][:10]]
    path.write_text(json.dumps(result | {"test_mirrored_accuracy": 0.8765}))
    done = read_pages(tmp_path, "print(pages.trials_table())")
    assert done.stdout.strip().endswith(f"| {shares[1]} | 87.65 (1) | {result['commit'][:10]} |")
