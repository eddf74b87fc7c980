"""`python -m capacitor_rt`: the same as `capacitor-rt`."""

from .cli import main

if __name__ == "__main__":
    main()
