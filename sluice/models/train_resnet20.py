"""Make the shipped checkpoint: ``python -m sluice.models.train_resnet20 --epochs 20 -o FILE``.

ResNet-20 on the 4,000 training digits by the recipe of :mod:`sluice.models.mnist`; the accuracy on the 1,000
test digits is printed and written into the file. The last weights are kept: no early stop, no best epoch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from sluice.core.errors import SluiceError
from sluice.models.mnist import accuracy, load_digits, train
from sluice.models.pretrained import CHECKPOINT, save_checkpoint
from sluice.models.resnet import resnet20

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, measure, write; exit status 0, or 1 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m sluice.models.train_resnet20", description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the digits")
    parser.add_argument("-o", "--output", default=str(CHECKPOINT), help="safetensors file to write")
    args = parser.parse_args(argv)
    options = f"--epochs {args.epochs} --lr {args.lr:g} --batch {args.batch} --seed {args.seed}"
    try:
        data = load_digits()
        torch.manual_seed(args.seed)
        model = train(resnet20(), data, args.epochs, args.lr, args.batch, args.seed)
        percent = accuracy(model, data.test_x, data.test_y)
        metadata = {
            "network": "resnet20",
            "accuracy": f"{percent:.2f}",
            "epochs": str(args.epochs),
            "seed": str(args.seed),
            "data_seed": "0",
            "command": f"{parser.prog} {options}",
        }
        save_checkpoint(model, args.output, metadata)
    except SluiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"accuracy {percent:.2f}% on {len(data.test_x)} test digits, written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
