"""Which noise schedule and parameterization a run has: those of its recipe, or those that a pretrained pipeline states."""

from difftrain.denoisers import pretrained_scheduler
from difftrain.parameterization import Parameterization
from difftrain.recipe import Recipe
from difftrain.registry import InputError
from difftrain.schedule import NoiseSchedule

Stated = tuple[NoiseSchedule, Parameterization]


def stated_beside(path: str | None) -> Stated | None:
    """What the scheduler that lies beside a pretrained model states."""
    config = pretrained_scheduler(path)
    if config is None:
        return None
    schedule = NoiseSchedule.from_diffusers(config)
    return schedule, "flow_prediction" if schedule.kind == "flow" else config.get("prediction_type", "epsilon")


def schedule_and_parameterization(recipe: Recipe, stated: Stated | None) -> Stated:
    """What the recipe states, or what the pretrained pipeline states; both is an error, neither too."""
    if stated is None:
        if recipe.schedule is None or recipe.parameterization is None:
            missing = "schedule" if recipe.schedule is None else "parameterization"
            example = "{type: linear}" if missing == "schedule" else "epsilon"
            raise InputError(f"{missing}: required, since the model brings none; write {missing}: {example}.")
        return recipe.schedule.build(), recipe.parameterization
    if recipe.schedule is not None:
        raise InputError("schedule: the pretrained pipeline states its own; leave the key out, "
                         "or give the path of the model's own folder, without scheduler/.")
    if recipe.parameterization not in (None, stated[1]):
        raise InputError(f"parameterization: {recipe.parameterization}, but the pretrained pipeline states {stated[1]}; "
                         "leave the key out.")
    return stated
