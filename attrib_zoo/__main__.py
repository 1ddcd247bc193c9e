"""``python -m attrib_zoo`` is the command ``attrib-zoo``."""

import sys

from attrib_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
