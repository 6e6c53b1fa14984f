"""A pool of surrogates along one training run, and cross-attention as what learns."""

import re

import pytest
import torch

from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.pool import BEFORE
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.finetuning import CrossAttention, Full, LoRA
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation, batch_loss, still_prompts, training_mode
from tests.devices.paths import photos

CPU = torch.device("cpu")
TRAINING = DreamBooth(
    learning_rate=1e-3, steps=4, batch_size=2, train_text_encoder=False, prior=PriorPreservation(weight=0.0)
)


def pooled(model, adaptation=None, members=2, ticks=None):
    settings = Settings(training=TRAINING, adaptation=adaptation, members=members)
    assembly = Assembly(METHODS["metacloak"], settings)
    assembly.adopt([model], lambda *_: None, seed=0)

    def progress(steps):
        for step in steps:
            if ticks is not None:
                ticks.append(step)
            yield step

    (pool,) = assembly.surrogates(photos(2, CPU), photos(3, CPU, 1), plain_weights, progress)
    return pool


def values(model):
    return [weight.detach().clone() for weight in model.learned()]


def attacked(pool, number):
    """The weights that a round attacks, and the loss that it reports."""
    turn = Turn(number)
    with pool.borrowed():
        loss = pool.learn_clean(turn, turn.generator(CPU))
        return values(pool.backbone), loss


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("adaptation", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_each_round_attacks_the_next_member_and_leaves_the_base_model(backbone, adaptation):
    ticks: list[int] = []
    pool = pooled(backbone, adaptation, ticks=ticks)
    base = values(backbone)
    found = [attacked(pool, number) for number in range(4)]
    assert ticks == [0, 1, 2, 3]  # trained once
    (first, second), again = [weights for weights, _ in found[:2]], [weights for weights, _ in found[2:]]
    assert same(first, again[0])
    assert same(second, again[1])
    assert not same(first, second)
    assert not same(first, base)
    assert same(values(backbone), base)
    assert all(loss > 0 for _, loss in found)
    assert pool.learn_cloaked(photos(2, CPU), Turn(0), Turn(0).generator(CPU)) == 0
    assert same(values(backbone), base)


def test_members_lie_on_one_run_of_one_optimizer(backbone):
    """Against a plain loop; a resumed run, which starts at a later round, has the same ones."""
    pool = pooled(backbone)
    base = values(backbone)
    last, _ = attacked(pool, 1)
    pool.members.clear()
    pool.losses.clear()
    assert same(attacked(pool, 3)[0], last)

    latents, optimizer = pool.clean, torch.optim.AdamW(backbone.learned(), lr=1e-3, weight_decay=1e-2)
    prompts = still_prompts(backbone, pool.training, False)
    with training_mode(backbone, pool.training):
        for number in range(2):
            noise = Turn(BEFORE + number).generator(CPU)
            for batch in Turn(number).batches(2, 2, 3, CPU):
                posterior = latents.rows(batch)
                draw = Draw.sample(backbone, posterior.mean.shape, noise)
                optimizer.zero_grad()
                batch_loss(backbone, pool.training, posterior, False, draw, prompts).backward()
                optimizer.step()
    for found, wanted, before in zip(last, values(backbone), base, strict=True):
        # The pool's AdamW is fused and this one is not: a thousandth of a step apart at most (lr 1e-3).
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert not torch.equal(wanted, before)


def test_a_pool_learns_as_a_victim_does_and_needs_a_step_for_each_member(small_model, backbone):
    assembly = Assembly(METHODS["metacloak"], Settings(members=3))
    assembly.adopt([backbone], lambda *_: None, seed=0)
    full = backbone.defaults.full
    found = assembly.trainings[0]
    assert (found.steps, found.batch_size, found.learning_rate) == (full.steps, full.batch_size, full.learning_rate)
    few = Assembly(METHODS["metacloak"], Settings(training=DreamBooth(steps=2), members=3))
    with pytest.raises(InputError, match="2 training steps give no 3 models"):
        few.require_possible([Source(str(small_model))])


def test_of_a_u_net_only_keys_and_values_of_the_text_learn(backbone):
    adaptation = CrossAttention()
    training = adaptation.surrogate_settings(DreamBooth(), backbone.defaults)
    assert not training.train_text_encoder
    adaptation.apply(backbone, training, seed=0)
    learned = {name for name, weight in backbone.named_parameters() if weight.requires_grad}
    layers = {name for name, _ in backbone.named_parameters() if re.search(r"attn2\.to_[kv]\.", name)}
    assert learned == layers != set()
    width = backbone.text_encoder.config.hidden_size
    assert all(backbone.get_parameter(name).shape[1] == width for name in learned)  # they read the text


def test_what_cross_attention_learned_is_a_whole_model(backbone, small_model, tmp_path):
    from antidreambooth.diffusion.loading import load_backbone

    adaptation = CrossAttention()
    adaptation.apply(backbone, adaptation.surrogate_settings(DreamBooth(), backbone.defaults), seed=0)
    with torch.no_grad():
        for weight in backbone.learned():
            weight.add_(0.01)
    adaptation.save(backbone, tmp_path / adaptation.folder)
    official = backbone.official.from_pretrained(tmp_path / adaptation.folder)
    fresh = load_backbone(str(small_model))
    adaptation.load(fresh, tmp_path / adaptation.folder)
    for name, weight in backbone.unet.state_dict().items():
        assert torch.equal(official.unet.state_dict()[name], weight)
        assert torch.equal(fresh.unet.state_dict()[name], weight)
    assert isinstance(adaptation, Full)
