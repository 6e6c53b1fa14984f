"""The families of base models, one file each, by the class of the pipeline that a model's folder names."""

from __future__ import annotations

from importlib import import_module

from antidreambooth.diffusion.backbone import Backbone

FAMILIES = {  # ``_class_name`` in model_index.json, and the class here: imported when it is asked for
    "StableDiffusionPipeline": "stable_diffusion.StableDiffusion",
    "StableDiffusionXLPipeline": "sdxl.StableDiffusionXL",
    "StableDiffusion3Pipeline": "sd3.StableDiffusion3",
    "FluxPipeline": "flux.Flux",
    "Flux2KleinPipeline": "flux2_klein.Flux2Klein",
    "ZImagePipeline": "z_image.ZImage",
    "QwenImagePipeline": "qwen_image.QwenImage",
    "SanaPipeline": "sana.Sana",
    "Lumina2Pipeline": "lumina2.Lumina2",
}


def family_named(pipeline: str) -> type[Backbone] | None:
    """The family whose official pipeline has this name, by exact match: a name like it is another model."""
    if pipeline not in FAMILIES:
        return None
    module, name = FAMILIES[pipeline].split(".")
    kind: type[Backbone] = getattr(import_module(f"{__name__}.{module}"), name)
    return kind
