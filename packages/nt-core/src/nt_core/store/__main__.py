"""`python -m nt_core.store status|verify PATH`: how far a store is; whether its tiles are what was written."""

import argparse
import sys

from nt_core.store import KernelStore


def main() -> int:
    """Runs a command. Returns the exit status: 1 if tiles were damaged, 2 if there is no store."""
    parser = argparse.ArgumentParser(prog="python -m nt_core.store", description=__doc__)
    parser.add_argument("command", choices=("status", "verify"))
    parser.add_argument("path")
    arguments = parser.parse_args()
    try:
        store = KernelStore(arguments.path)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.command == "status":
        for name, matrix in store.matrices.items():
            print(f"{name}: {' x '.join(map(str, matrix.shape))}, {matrix.dtype}")
        print(f"{store.status()}, of {store.grid.rows} x {store.grid.columns} samples")
        return 0
    damaged = store.verify()
    for tile in damaged:
        print(f"tile {tile} was damaged, and is removed")
    print(f"{store.status()} are intact")
    return int(bool(damaged))


if __name__ == "__main__":
    sys.exit(main())
