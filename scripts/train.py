"""Train a network from a YAML config: the same as `certtrain train`."""

import sys

from certtrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
