"""Entry point for launchers: `accelerate launch -m difftrain.sample ...`."""

from difftrain.commands.entry import main

if __name__ == "__main__":
    main("sample")
