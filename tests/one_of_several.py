"""One process of `rpo-kernels train` among several: what test_train_distributed starts."""

import os
import sys
import time

import rpo_kernels.train.reference as reference
from rpo_kernels.cli import main


def slow(function):
    """The function, late enough for the other processes to be ahead."""
    return lambda *args: (time.sleep(2), function(*args))[1]


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        reference._read = slow(reference._read)
    sys.exit(main(sys.argv[1:]))
