"""The four recipes of docs/contributing.md for adding a thing, carried out in a copy of the package."""

import csv
import json
import re
import shutil

from command_lines import ROOT, TINY, start

# Where the page's blocks go, in their order: a file, and the line before which; None: at the end.
PLACES = (
    ("method/related_regularizers.py", None),
    ("trainer/data/sources.py", None),
    ("diagnosis/signals.py", "    scale: float = column("),
    ("trainer/recipe.py", "    warmup_steps: int = _field("),
)


def test_a_run_with_an_added_regularizer_source_column_and_recipe_value(tmp_path):
    shutil.copytree(ROOT / "ortho_keras", tmp_path / "ortho_keras")
    for name in ("train.py", "ortho_train.py"):
        shutil.copy(ROOT / name, tmp_path)
    blocks = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "contributing.md").read_text(), re.DOTALL | re.MULTILINE)
    for (name, before), block in zip(PLACES, blocks, strict=True):
        path = tmp_path / "ortho_keras" / name
        text = path.read_text()
        assert before is None or text.count(before) == 1
        path.write_text(f"{text}\n\n{block}" if before is None else text.replace(before, block + before))
    added = ["--regularizer=rows", "--factor=0.1", "--dataset=stripes", "--clip_norm=1", "--signal_every=5"]
    given = [*TINY, *added, "--epochs=10", "--batch_size=16", "--learning_rate=0.03", f"--workdir={tmp_path / 'run'}"]
    process = start(tmp_path / "train.py", *given)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "") and "images (8, 8, 1), 2 classes" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    values = {"regularizer": "rows", "factor": 0.1, "dataset": "stripes", "clip_norm": 1.0}
    assert values.items() <= result["recipe"].items() and result["test_accuracy"] > 0.9
    first, *_, last = json.loads((tmp_path / "run" / "history.json").read_text())
    assert first["penalty"] > last["penalty"] > 0  # it is trained with
    with open(tmp_path / "run" / "signals.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["parameters"] == "18"  # 3 x 3 kernels of 2 filters
