"""Entry point of `python -m difftrain`."""

from difftrain.commands.entry import main

if __name__ == "__main__":
    main()
