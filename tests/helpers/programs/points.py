"""Run by every process under torchrun: train points in FOLDER without a recipe, in two halves."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from difftrain.core.processes import num_processes
from difftrain.training.ema import ConstantDecay
from helpers.points import point_trainer

FOLDER, NUM_PROCESSES = Path(sys.argv[1]), int(sys.argv[2])
for steps in (3, 6):
    trainer = point_trainer(FOLDER, "pair", steps=steps, ema=ConstantDecay(0.5))
    assert num_processes() == NUM_PROCESSES
    assert trainer.train()
trainer.accelerator.end_training()
