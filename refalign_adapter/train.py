"""`accelerate launch -m refalign_adapter.train --config FILE [key=value …]`, see `commands.train`."""

import sys

from .commands.train import main

if __name__ == "__main__":
    sys.exit(main())
