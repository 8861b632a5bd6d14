"""Trains a recipe and writes result.json, curves.png and final.keras.

python train.py                                       44 layers on handwritten digits, no download
python train.py --recipe=plain44_cifar10 --epochs=5   every value of a recipe is a flag (--list_recipes)

On two machines, run the same command on each, with index 0 on the first (which writes the files) and index 1 on the second:

TF_CONFIG='{"cluster": {"worker": ["host0:5000", "host1:5000"]}, "task": {"type": "worker", "index": 0}}' python train.py
"""

import ortho_train

if __name__ == "__main__":
    ortho_train.main()
