"""Entry point of `python -m difftrain`."""

from difftrain.commands.app import main

if __name__ == "__main__":
    main()
