import sys

from certtrain.cli import main

sys.exit(main())
