"""Entry point for launchers: `accelerate launch -m difftrain.compare ...`."""

from difftrain.commands.app import main

if __name__ == "__main__":
    main("compare")
