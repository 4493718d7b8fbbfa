"""Fuzz for a number of minutes: rounds of new examples until the time is over or one fails. `make fuzz MINUTES=30`."""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--examples", type=int, default=60, help="of each test in a round")
    arguments = parser.parse_args()
    end, rounds = time.monotonic() + 60 * arguments.minutes, 0
    environment = dict(os.environ, RPO_FUZZ_EXAMPLES=str(arguments.examples))
    while time.monotonic() < end:
        seed = random.randrange(2**31)
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"--hypothesis-seed={seed}", str(Path(__file__).parent)]
        try:
            code = subprocess.run(command, env=environment, timeout=end - time.monotonic()).returncode
        except subprocess.TimeoutExpired:
            break
        if code:
            print(f"failed with --hypothesis-seed={seed} and RPO_FUZZ_EXAMPLES={arguments.examples}")
            return code
        rounds += 1
    print(f"{rounds} rounds of {arguments.examples} examples a test, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
