"""Encode a recipe's data once: `accelerate launch recipes/cache.py --config FILE [key=value …]`.

The same as `accelerate launch -m refalign_adapter.cache`, and as `refalign cache` on one process.
"""

import sys

from refalign_adapter.cache import main

if __name__ == "__main__":
    sys.exit(main())
