"""Train an adapter: `accelerate launch recipes/train.py --config FILE [key=value …]`; `--help` lists every field.

The same as `accelerate launch -m refalign_adapter.train`. To write a loop of your own, begin with
`refalign_adapter/training/loop.py` and `refalign_adapter/training/step.py`.
"""

import sys

from refalign_adapter.train import main

if __name__ == "__main__":
    sys.exit(main())
