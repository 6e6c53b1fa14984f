"""The likelihood ratio: the photos become less likely as the person's, and more likely as those of a nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.objectives.base import Objective
from antidreambooth.attack.objectives.denoising import Denoising
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.densities import TimestepSampler
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.layout import family_of, read_defaults
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import has_own_memory
from antidreambooth.diffusion.source import Source, whole_folder
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.provenance import person_in

BASE = "base"  # instead of a decoy's name: the base model that a run attacks, or trains its surrogate from


class LikelihoodRatio(Denoising):
    """L(x; w_person, c) - L(x; w_nobody, c), with the same latent, timestep and noise in both: the decoy.

    Ours. A denoising loss bounds the negative logarithm of a likelihood (arXiv:2006.11239, equation 3), so this climbs
    the logarithm of the ratio p_nobody / p_person. What both models know of all pictures cancels out, and what is left
    tells the person from somebody who does not exist; no real person is imitated.

    Args:
        decoy: the model that was taught the nobody: the ``model/`` of ``fit -c configs/dreambooth.yaml``. FSMG trains
            it by itself when not given, as it trains the person's. With ``base`` it is the run's own base model, which
            knows nobody by name and needs no training.
        prompt: what that model knows the nobody as; when not given what the manifest beside it says, and of ``base``
            the class prompt.
        timesteps: how t is drawn; as the base model's fine-tuning draws it when not given.
        detached_target: see ``Denoising``.
    """

    def __init__(
        self,
        decoy: str | Source | None = None,
        prompt: str | None = None,
        timesteps: TimestepSampler | None = None,
        detached_target: bool = False,
    ) -> None:
        super().__init__(timesteps, detached_target)
        self.decoy, self.prompt = decoy, prompt
        # A model that the run itself knows, and its prompt: not what the user has chosen, and so no setting.
        self.known_to_run: tuple[Source, str] | None = None
        self._known: WeakKeyDictionary[Backbone, tuple[Backbone, Conditioning]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without models."""
        return {**self.__dict__, "_known": None}

    @property
    def models(self) -> Sequence[Backbone]:
        """The nobody's."""
        return [model for model, _ in (self._known or {}).values()]

    def require_possible(self, source: Source) -> None:
        """Refuses a decoy that is of another family than the base model.

        Raises:
            InputError: it is.
        """
        if self.decoy in (None, BASE):
            return
        if (kind := family_of(self.decoy)) is not family_of(source):
            raise InputError(
                f"the decoy {self.decoy} is a {kind.family} model and the backbone {source} none: train both on the "
                "same base model"
            )

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:
        """Loads the nobody's model, where it is not there, and asks its text encoders once."""
        if self._known is None or backbone not in self._known:
            self.oppose(backbone, *self._loaded(backbone))

    def oppose(self, backbone: Backbone, nobody: Backbone, known_as: Conditioning) -> None:
        """Takes a model of nobody that is in memory.

        Args:
            backbone: the surrogate's, which it is compared with.
            nobody: where the surrogate is.
            known_as: what it is asked for.
        """
        self._known = self._known or WeakKeyDictionary()
        self._known[backbone] = nobody, known_as

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The difference of both losses of each image."""
        assert self._known is not None  # prepared
        nobody, known_as = self._known[backbone]
        person = super().__call__(backbone, posterior, embedding, draw)
        return person - super().__call__(nobody, posterior, known_as, draw)

    def _loaded(self, backbone: Backbone) -> tuple[Backbone, Conditioning]:
        """The nobody's model where the person's is, without text encoders, and what it is asked for."""
        source, prompt = self._chosen()
        model, device = load_backbone(source), backbone.device
        if has_own_memory(device):
            model.rest_text_encoders(device, [[prompt]])
        model.to(device)
        with torch.no_grad():
            embedding = model.embed([prompt])
        for name in list(model.text_encoders):
            delattr(model, name)  # large, and not asked again
        model.checkpoint(bool(getattr(backbone.denoiser, "is_gradient_checkpointing", False)))
        return model, embedding

    def _chosen(self) -> tuple[Source, str]:
        """Which model, and what it knows the nobody as."""
        if self.known_to_run is not None:
            return self.known_to_run
        source = Source.of(self.decoy)
        folder = whole_folder(source)
        noted = person_in(folder) if folder else None
        return source, self.prompt or noted or DreamBooth().instance_prompt


def decoys(objective: Objective) -> list[LikelihoodRatio]:
    """The likelihood ratios in an objective that nobody has given a decoy."""
    return [one for one in objective.members() if isinstance(one, LikelihoodRatio) and one.decoy is None]


def against_base(objective: Objective) -> list[LikelihoodRatio]:
    """The likelihood ratios in an objective that compare with the run's own base model."""
    return [one for one in objective.members() if isinstance(one, LikelihoodRatio) and one.decoy == BASE]


def oppose_base(objective: Objective, base: Source) -> None:
    """Tells the likelihood ratios that compare with the run's own base model which one that is.

    Args:
        objective: with such ratios in it, or without.
        base: the base model.
    """
    for ratio in against_base(objective):
        prompt = read_defaults(base).class_prompt if ratio.prompt is None else ratio.prompt
        ratio.known_to_run = base, prompt


def require_decoys(objective: Objective) -> None:
    """Refuses a likelihood ratio for which nobody trains a decoy.

    Raises:
        InputError: there is one.
    """
    if decoys(objective):
        raise InputError(
            "LikelihoodRatio needs a model that was taught a nobody: give --model.objective.decoy, in Python "
            "LikelihoodRatio(decoy=FOLDER), or run configs/decoy.yaml, which trains one"
        )
