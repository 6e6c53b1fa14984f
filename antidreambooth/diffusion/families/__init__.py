"""The families of base models, one file each, by the class of the pipeline that a model's folder names."""

from __future__ import annotations

from importlib import import_module

from antidreambooth.diffusion.backbone import Backbone

FAMILIES = {  # ``_class_name`` in model_index.json, and the class here: imported when it is asked for
    "StableDiffusionPipeline": "stable_diffusion.StableDiffusion",
}


def family_named(pipeline: str) -> type[Backbone] | None:
    """The family whose official pipeline has this name, by exact match: a name like it is another model."""
    if pipeline not in FAMILIES:
        return None
    module, name = FAMILIES[pipeline].split(".")
    kind: type[Backbone] = getattr(import_module(f"{__name__}.{module}"), name)
    return kind
