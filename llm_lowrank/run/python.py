"""Training from Python: in a notebook, or in a script of one's own. See docs/python.md."""

from llm_lowrank.run import train as loop
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import Recipe
from llm_lowrank.run.trained import Trained


def train(recipe: Recipe) -> Trained:
    """Check the recipe, train as it says, and return what was measured and where the files lie.

    A process may call it any number of times, one run after the other. Under a launcher every rank calls it.
    RecipeError says what is wrong with a recipe, before a model is loaded. Preempted says that SIGTERM or SIGUSR1 ended
    the run early, with a checkpoint.
    """
    if recipe.dry_run:
        raise RecipeError("dry_run is for the command line: llm-lowrank train --dry_run prints the plan; remove it")
    validate(recipe)
    return loop.train(recipe)
