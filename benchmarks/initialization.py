"""Where the signal goes before any training: the error's growth and the images' share of the variance, by depth and shift.

python benchmarks/initialization.py --data_dir=PATH

One batch of 128 training images, `signal_report` on nets at their initial weights, three seeds each. Writes
`results/initialization.json`; resumes where it was stopped.
"""

import importlib.metadata
import json
import shlex
import statistics
import sys

import keras
from absl import app, flags
from runs import ROOT, commit

import ortho_keras
from ortho_keras.method.files import write_json
from ortho_keras.trainer.data import load_data

FLAGS = flags.FLAGS
PATH = ROOT / "benchmarks" / "results" / "initialization.json"
NETS = {
    "He initialization, ReLU": {"initializer": "he_normal"},
    "orthonormal, ReLU": {},
    "delta-orthonormal, ReLU": {"initializer": "delta_orthonormal"},
    "orthonormal, max(x, -1)": {"relu_shift": 1.0},
    "orthonormal, max(x, -2)": {"relu_shift": 2.0},
    "orthonormal, max(x, -3)": {"relu_shift": 3.0},
    "orthonormal, max(x, -5)": {"relu_shift": 5.0},
    "delta-orthonormal, max(x, -2)": {"initializer": "delta_orthonormal", "relu_shift": 2.0},
    "Dirac, ReLU": {"initializer": "dirac"},
    "Dirac, max(x, -1)": {"initializer": "dirac", "relu_shift": 1.0},
    "Dirac, max(x, -2)": {"initializer": "dirac", "relu_shift": 2.0},
}
DATA = {"digits": 8, "cifar10": 16}

flags.DEFINE_list("depths", ["44", "110"], "Layers.")
flags.DEFINE_list("datasets", list(DATA), "Data sets.")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")


def measure(data, depth, arguments, seed):
    """Returns the error's growth, in all and a layer, and the lowest image share, of one net."""
    mean, variance = data.channel_statistics
    batch = data.train.take(slice(128))
    normalization = keras.layers.Normalization(mean=mean, variance=variance)
    model = ortho_keras.plain_cnn(depth, data.image_shape, 10, seed=seed, preprocessing=normalization, **arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    report = ortho_keras.signal_report(model, batch.images.astype("float32"), batch.labels, loss, singular_values=False)
    total, per_layer, _ = report.growth
    return {"total": total, "per_layer": per_layer, "image_share": min(x.image_share for x in report.layers if x.positions)}


def main(_):
    kept = json.loads(PATH.read_text()) if PATH.exists() else {"rows": []}
    done = {(row["dataset"], row["depth"], row["net"]) for row in kept["rows"]}
    for dataset in FLAGS.datasets:
        data = load_data(dataset, FLAGS.data_dir, DATA[dataset])
        for depth in map(int, FLAGS.depths):
            for net, arguments in NETS.items():
                if (dataset, depth, net) in done:
                    continue
                runs = [measure(data, depth, arguments, seed) for seed in range(3)]
                keras.backend.clear_session()
                row = {"dataset": dataset, "image_size": DATA[dataset], "depth": depth, "net": net, "runs": runs}
                row |= {name: statistics.geometric_mean(run[name] for run in runs) for name in runs[0]}
                kept["rows"].append({**row, "commit": commit()})
                versions = {"tensorflow": importlib.metadata.version("tensorflow"), "keras": keras.__version__}
                given = [flag for flag in sys.argv[1:] if not flag.startswith("--data_dir=")]
                kept |= {"command": shlex.join(["python", "benchmarks/initialization.py", *given]), "versions": versions}
                print(dataset, depth, net, {name: f"{row[name]:.3g}" for name in runs[0]}, flush=True)
                write_json(PATH, kept)


if __name__ == "__main__":
    app.run(main)
