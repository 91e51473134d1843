"""Natural, PGD and verified error of a trained network: the same as `certtrain verify`."""

import sys

from certtrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
