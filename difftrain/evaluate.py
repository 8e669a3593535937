"""Entry point for launchers: `accelerate launch -m difftrain.evaluate ...`."""

from difftrain.commands.entry import main

if __name__ == "__main__":
    main("evaluate")
