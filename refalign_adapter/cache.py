"""`accelerate launch -m refalign_adapter.cache --config FILE [key=value …]`, see `commands.cache`."""

import sys

from .commands.cache import main

if __name__ == "__main__":
    sys.exit(main())
