"""Each objective against its formula and autograd, on a DDPM, a flow, and a flow whose autoencoder has no spread."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from antidreambooth.attack.canvas import SquareCanvas
from antidreambooth.attack.cost import counted
from antidreambooth.attack.methods import METHODS, Assembly, Settings
from antidreambooth.attack.objectives import (
    ACE,
    Denoising,
    EncoderAway,
    EncoderSpread,
    EncoderTarget,
    LikelihoodRatio,
    ScoreDistillation,
    Term,
    Transformed,
    Weighted,
)
from antidreambooth.attack.objectives.ratio import require_decoys
from antidreambooth.attack.perturbation import PGD, pixel_gradient
from antidreambooth.attack.steps import Sign
from antidreambooth.attack.surrogates import Fixed
from antidreambooth.attack.targets import target_image
from antidreambooth.attack.transforms import Crop, Flip
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import to_float
from tests.conftest import random_images
from tests.families.tiny import SIDE, save

PROMPT = "a photo of sks person"
NAMES = ("sd-v", "flux", "sana")  # v-prediction, a flow, a flow without a spread


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each tiny model twice: the person's, and the nobody's."""
    root = tmp_path_factory.mktemp("models")
    return {name: [save(name, root / f"{name}-{seed}", seed) for seed in (0, 1)] for name in NAMES}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: [load_backbone(str(folder)) for folder in pair] for name, pair in folders.items()}


@pytest.fixture(params=NAMES)
def case(request, folders, loaded):
    """A model, what it sees, and the folder of another one of its kind."""
    model = loaded[request.param][0]
    images, clean = to_float(random_images(2, SIDE)) * 0.9, to_float(random_images(2, SIDE, seed=1)) * 0.9
    return model, images, clean, model.embed([PROMPT]), loaded[request.param][1], folders[request.param][1]


def generator():
    return Turn(0).generator(torch.device("cpu"))


def mean_square(values):
    return values.square().flatten(1).mean(dim=1)


def latents_of(model, pixels, draw):
    posterior = model.encode(pixels)
    return posterior.mean + posterior.std * draw.posterior_noise


def noised(model, latents, draw):
    signal, spread = (getattr(model.noising, name)[draw.timesteps].view(-1, 1, 1, 1) for name in ("signal", "spread"))
    return signal * latents + spread * draw.noise, signal, spread


def pulled(name):
    """The distance of the encoder's mean from that of a picture, with a minus."""

    def formula(model, pixels, clean, embedding, draw, nobody):
        return -mean_square(model.encode(pixels).mean - model.encode(target_image(name, SIDE)).mean)

    return formula


def pushed(model, pixels, clean, embedding, draw, nobody):
    now, before = model.encode(pixels), model.encode(clean)
    moved = 2 * mean_square(now.mean - before.mean)
    return moved + (3 * mean_square((now.std**2).log() - (before.std**2).log()) if model.spread else 0)


def unsure(model, pixels, clean, embedding, draw, nobody):
    return (model.encode(pixels).std ** 2).log().flatten(1).mean(dim=1)


def consistent(model, pixels, clean, embedding, draw, nobody):
    noisy, _, _ = noised(model, latents_of(model, pixels, draw), draw)
    predicted = model.predict(noisy, draw.timesteps, embedding.expanded(2))
    return -mean_square(predicted - model.encode(target_image("rings", SIDE)).mean)


def distilled(model, pixels, clean, embedding, draw, nobody):
    """Its gradient is (e_pred - e) dz_t/dx, twice over the number of values, as that of a mean of squares."""
    noisy, signal, spread = noised(model, latents_of(model, pixels, draw), draw)
    with torch.no_grad():
        u = model.predict(noisy, draw.timesteps, embedding.expanded(2))
        e_pred = signal * u + spread * noisy if model.family.startswith("Stable") else noisy + (1 - spread) * u
    return -2 * ((e_pred - draw.noise) * noisy).flatten(1).mean(dim=1)


def ratio(model, pixels, clean, embedding, draw, nobody):
    latents = latents_of(model, pixels, draw)
    known_as = nobody.embed([PROMPT])
    losses = [
        one.denoising_loss(latents, draw.timesteps, draw.noise, told.expanded(2))
        for one, told in ((model, embedding), (nobody, known_as))
    ]
    return losses[0] - losses[1]


CASES = {
    "grey": (lambda model, folder: EncoderTarget(), pulled("grey")),
    "rings": (lambda model, folder: EncoderTarget("rings"), pulled("rings")),
    "away": (lambda model, folder: EncoderAway(2.0, 3.0 if model.spread else 0.0), pushed),
    "spread": (lambda model, folder: EncoderSpread(), unsure),
    "ace": (lambda model, folder: ACE("rings"), consistent),
    "sds": (lambda model, folder: ScoreDistillation(), distilled),
    "ratio": (lambda model, folder: LikelihoodRatio(str(folder)), ratio),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_formula(case, name):
    model, images, clean, embedding, nobody, folder = case
    make, formula = CASES[name]
    objective = make(model, folder)
    if name == "spread" and not model.spread:
        return  # refused, see below
    objective.prepare(model, images)
    draws = [objective.draw(model, images, generator())]
    (draw,) = objective.compared(model, clean, draws, micro_batch=1)
    found = pixel_gradient(objective, model, images, embedding, [draw], micro_batch=1)
    pixels = images.clone().requires_grad_()
    value = formula(model, pixels, clean, embedding, draw, nobody).mean()
    (wanted,) = torch.autograd.grad(value, pixels)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found.gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    if name != "sds":  # whose formula has the gradient alone
        torch.testing.assert_close(found.objective, value.detach(), rtol=1e-4, atol=1e-6)


def test_score_distillation_shows_the_loss_in_noise_and_goes_both_ways(case, monkeypatch):
    model, images, _, embedding, _, _ = case
    draw, graphs = Denoising().draw(model, images, generator()), []
    predict = model.predict

    def watched(*arguments):
        graphs.append(predict(*arguments))
        return graphs[-1]

    monkeypatch.setattr(model, "predict", watched)
    down, up = (
        pixel_gradient(ScoreDistillation(descend), model, images, embedding, [draw], 2) for descend in (True, False)
    )
    assert not any(prediction.requires_grad for prediction in graphs)  # no way back through the denoiser
    torch.testing.assert_close(down.gradient, -up.gradient)
    latents = latents_of(model, images, draw)
    noisy, _, _ = noised(model, latents, draw)
    e_pred = model.noising.noise(noisy, draw.timesteps, predict(noisy, draw.timesteps, embedding.expanded(2)))
    torch.testing.assert_close(up.objective, mean_square(e_pred - draw.noise).mean())
    torch.testing.assert_close(down.objective, -up.objective)


def test_a_prediction_converted_to_noise_is_the_noise_where_the_prediction_is_right(case):
    noising = case[0].noising
    latents, noise = torch.randn((2, 3, 4, 2, 2), generator=generator())
    t = torch.tensor([1, 400, len(noising) - 1])
    found = noising.noise(noising.add_noise(latents, t, noise), t, noising.target(latents, t, noise))
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-4)


def sums(model):
    away = EncoderAway(log_variance=1.0 if model.spread else 0.0)
    return Weighted(
        [
            Term(Denoising(), 0.5),
            Term(Transformed([Flip(), Crop(0.5)], Weighted([Term(away), Term(Denoising(), -1.0)])), 2.0),
            Term(EncoderTarget("rings")),
            Term(away, 0.1),
        ]
    )


def test_a_sum_is_the_sum_of_its_terms(case):
    """Each on its own draws; with several draws, photos one at a time, and terms that see other pictures."""
    model, images, clean, embedding, _, _ = case
    objective, source = sums(model), generator()
    objective.prepare(model, images)
    draws = objective.compared(model, clean, [objective.draw(model, images, source) for _ in range(2)], 2)
    one_by_one = pixel_gradient(objective, model, images, embedding, draws, micro_batch=1)
    wanted, value = torch.zeros_like(images), torch.zeros(())
    for number, term in enumerate(objective.terms):
        parts = [draw.parts[number] for draw in draws]
        found = pixel_gradient(term.objective, model, images, embedding, parts, micro_batch=2)
        wanted, value = wanted + term.weight * found.gradient, value + term.weight * found.objective
    torch.testing.assert_close(one_by_one.gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    torch.testing.assert_close(one_by_one.objective, value, rtol=1e-4, atol=1e-5)
    first, second = (draw.parts[0].noise for draw in draws)
    assert not torch.equal(first, second)
    assert not torch.equal(first, draws[0].parts[1].parts[1].noise)  # a term's draws are its own


def test_terms_that_see_the_photos_as_they_are_share_one_encoding(loaded):
    model = loaded["sd-v"][0]
    images, embedding = to_float(random_images(2, SIDE)), model.embed([PROMPT])
    plain = Weighted([Term(Denoising()), Term(EncoderTarget()), Term(ACE())])
    for objective, encodings in ((plain, 1), (Weighted([*plain.terms, Term(Transformed([Flip()], ACE()))]), 2)):
        objective.prepare(model, images)
        draw = objective.draw(model, images, generator())
        with counted([model]) as passes:
            pixel_gradient(objective, model, images, embedding, [draw], 2)
        assert passes.encoder == 2 * encodings == 2 * objective.encodings
        assert passes.denoiser == 2 * (encodings + 1)


def test_draws_of_any_form_are_taken_apart_and_put_together(loaded):
    """As a recording does it."""
    model = loaded["sd-v"][0]
    images = to_float(random_images(3, SIDE))
    objective, source = sums(model), generator()
    draw, other = (objective.draw(model, images, source) for _ in range(2))
    (draw,) = objective.compared(model, images, [draw], 2)
    (other,) = objective.compared(model, images.flip(0), [other], 2)
    again = other.filled(draw.tensors)
    assert len(again.tensors) == len(draw.tensors) > 10
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, draw.tensors, strict=True))
    assert all(torch.equal(a, b[1:]) for a, b in zip(draw.rows(slice(1, 3)).tensors, draw.tensors, strict=True))
    assert isinstance(again.parts[1].parts[0], Draw)


@pytest.mark.parametrize("objective", [EncoderAway(), Weighted([Term(Transformed([Flip()], EncoderAway()))])])
def test_what_starts_at_its_least_wants_a_random_start(objective):
    with pytest.raises(InputError, match=r"no gradient on photos without any change: use .*random_start true"):
        Assembly(METHODS["photoguard"], Settings(objective=objective))
    Assembly(METHODS["photoguard"], Settings(objective=objective, step_rule=Sign(random_start=True)))
    Assembly(METHODS["advdm"], Settings(objective=Weighted([Term(objective), Term(Denoising())])))


def test_pgd_pushes_the_latents_away_from_the_clean_ones(loaded):
    model = loaded["sd-v"][0]
    originals = to_float(random_images(2, SIDE)) * 0.5
    attack = PGD(steps=20, objective=EncoderAway(), rule=Sign(random_start=True))
    canvas = SquareCanvas(originals)
    start = originals + attack.start(canvas, 0)
    with counted([model]) as passes:
        moved = attack(Fixed(model, None), canvas, start, Turn(0), generator()).state
    assert passes.denoiser == 0
    assert passes.encoder == 2 * 20 + 2  # the clean squares are the same in all steps
    before, noise, after = (model.encode_all(images, 2).mean for images in (originals, start, moved))
    assert mean_square(after - before).min() > 4 * mean_square(noise - before).max()


@pytest.mark.parametrize(
    "objective",
    [EncoderAway(), EncoderSpread(), Weighted([Term(Denoising()), Term(Transformed([Flip()], EncoderSpread()))])],
)
def test_a_variance_that_there_is_not_is_refused_before_loading(objective, folders):
    rule = Sign(random_start=True)
    assembly = Assembly(METHODS["advdm"], Settings(objective=objective, step_rule=rule))
    with pytest.raises(
        InputError, match=r"looks at the variance of latents, and the autoencoder of Sana gives them none"
    ):
        assembly.require_possible([Source(str(folders["sana"][0]))])
    assembly.require_possible([Source(str(folders["flux"][0]))])
    without = Assembly(METHODS["pid"], Settings(objective=EncoderAway(log_variance=0.0)))
    without.require_possible([Source(str(folders["sana"][0]))])


@pytest.mark.parametrize("method", ["aspl", "fsmg"])
def test_a_surrogate_that_would_change_nothing_is_refused(method):
    with pytest.raises(InputError, match=r"asks the encoder alone, which no surrogate changes: .* null"):
        Assembly(METHODS[method], Settings(objective=EncoderTarget()))


def test_the_encoder_alone_is_loaded_and_encodes_the_same(case, folders):
    model = case[0]
    name = next(name for name, pair in folders.items() if case[5] in pair)
    bare = load_backbone(str(folders[name][0]), encoder_only=True)
    assert bare.denoiser is None
    assert not bare.text_encoders
    assert {part.split(".")[0] for part, _ in bare.named_parameters()} == {"vae"}
    assert all(torch.equal(a, b) for a, b in zip(bare.encode(case[1]), model.encode(case[1]), strict=True))
    assert torch.equal(bare.reconstruct(case[1]), model.reconstruct(case[1]))
    assert bare.fingerprint() != model.fingerprint()
    bare.checkpoint(True)


def test_nobody_is_loaded_once_and_not_copied(folders, loaded):
    model, folder = loaded["sd-v"][0], folders["sd-v"][1]
    objective, images = LikelihoodRatio(str(folder)), to_float(random_images(2, SIDE))
    assert list(objective.models) == []
    for _ in range(2):
        Weighted([Term(objective)]).prepare(model, images)
    (nobody,) = Transformed([Flip()], objective).models
    assert not nobody.text_encoders
    assert not nobody.learned()
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert list(twin.models) == []
        assert twin.decoy == str(folder)


def test_a_decoy_of_another_family_and_none_at_all_are_refused(folders):
    objective = LikelihoodRatio(str(folders["flux"][0]))
    with pytest.raises(InputError, match=r"is a FLUX.* and the backbone .* train both on the same base model"):
        Assembly(METHODS["fsmg"], Settings(objective=objective)).require_possible([Source(str(folders["sana"][0]))])
    require_decoys(objective)
    with pytest.raises(InputError, match=r"needs a model that was taught a nobody: .*configs/decoy\.yaml"):
        require_decoys(Weighted([Term(LikelihoodRatio())]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Weighted([]), "leave out Weighted"),
        (lambda: EncoderAway(0.0, 0.0), "nothing to climb"),
        (lambda: EncoderAway(-1.0), "mean"),
        (lambda: EncoderTarget("nowhere.png"), "no picture's file"),
        (lambda: ACE("nowhere.png"), "no picture's file"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_clean_photos_are_encoded_anew_where_each_step_sees_another_part(loaded):
    model, objective = loaded["sd-v"][0], EncoderAway()
    images = to_float(random_images(2, SIDE))
    draw = objective.draw(model, images, generator())
    first, second = (objective.compared(model, images, [draw], 2)[0].clean for _ in range(2))
    assert first[0] is second[0]
    (other,) = objective.compared(model, images.flip(-1), [replace(draw)], 2)
    torch.testing.assert_close(other.clean[0], model.encode(images.flip(-1)).mean.detach())
    assert not torch.equal(other.clean[0], first[0])
