"""How long runs will take, from a few passes through their base model on this machine."""

from __future__ import annotations

from pathlib import Path

from antidreambooth.attack.methods import METHODS, Method
from antidreambooth.diffusion.loading import read_defaults
from launch.cost import cloak_passes, drawing, measure
from launch.runs import is_config
from launch.verdict.experiment import BASE, Experiment

PHOTOS = 4  # a person has, typically
MODELS = 3  # of an ensemble, typically
OVERHEAD = 8.0  # seconds a cell: loading, writing, finding and measuring faces


def estimate(experiment: Experiment, workers: int, cloaks: int, cells: int) -> float:
    """Seconds for what is left to do, give or take a half; on GPUs the passes are timed on the first one."""
    passed = measure(experiment.backbone, workers).seconds
    defaults, asked = read_defaults(experiment.backbone), experiment.generation
    pictures = len(asked.prompts) * asked.images * drawing(asked.sampling_steps or defaults.sampling_steps)
    recipes = [defaults.recipe("lora" if "lora" in how else "full") for how in experiment.victims.values()]
    victim = sum(recipe.steps * recipe.batch_size for recipe in recipes) / len(recipes)
    methods = [usual_method(how) for how in experiment.protections.values() if is_config(how.split()[0])]
    made = [cloak_passes(method, defaults, PHOTOS, MODELS if method.several else 1) for method in methods]
    cloak = sum(made) / max(1, len(made))
    seconds = passed * (cloaks * cloak + cells * (victim + pictures)) + cells * OVERHEAD
    return seconds / max(1, min(workers, cloaks + cells))


def usual_method(how: str) -> Method:
    """The method that a config is named after; ASPL otherwise."""
    return METHODS.get(Path(how.split()[0]).stem, METHODS["aspl"])


def left(experiment: Experiment) -> tuple[int, int]:
    """Cloaks and cells that are not finished."""
    cloaks = [cloak for cloak in experiment.cloaks() if not experiment.cloak_record(cloak).is_file()]
    cells = [cell for cell in experiment.cells() if not experiment.cell_record(cell).is_file()]
    return len(cloaks), len([cell for cell in cells if cell.cloak.protection != BASE])
