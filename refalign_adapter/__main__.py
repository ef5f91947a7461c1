"""`python -m refalign_adapter`: the same as `refalign`."""

from .commands.app import main

if __name__ == "__main__":
    main()
