"""What the pages say: figures are those of the result files, flags and names exist, a broken net is mended as one page says.

That the other pages' code runs: test_docs.py.
"""

import pathlib
import re
import subprocess
import sys

import train
from ortho_keras.trainer.recipes import RECIPES
from tuning import search

ROOT = pathlib.Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def test_figures_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "pages.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_on_a_net_that_does_not_train_ends_with_one_that_does(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "my-deep-net-does-not-train.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:  # one after the other, as a reader would
        exec(block, names)
    lines = capsys.readouterr().out.splitlines()
    printed = [line for line in lines if line and not re.match(r"Epoch \d|\d+/\d+ - ", line)]  # without the lines of `fit`
    broken, found, tamed, healthy, fixed, accuracy = printed
    assert float(broken) < 0.2 and "the error grows" in found
    assert float(tamed) > float(broken) + 0.05
    # Another number of threads rounds otherwise, and ends a little higher or lower.
    assert "nothing is wrong" in healthy and float(fixed) > 0.8 and float(accuracy) > 0.7
    assert (tmp_path / "signal.png").exists()


def test_flags_and_names_exist():
    import ortho_keras

    flags = set(re.findall(r"`--(?:no)?([a-z_0-9]+)", README)) | set(re.findall(r" --([a-z_]+)=", README))
    assert len(flags) > 20 and flags - {"help", "models", "output"} <= set(search.FLAGS)
    names = re.findall(r"^\| `(\w+)", README, re.MULTILINE)
    rows = [name for name in names if name not in ("none", "mirrored", "multi_worker", *RECIPES)]
    assert len(rows) > 6 and all(hasattr(ortho_keras, name) for name in rows)
