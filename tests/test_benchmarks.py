"""The benchmarks count what they say they count, and run where there is no GPU."""

import argparse
import contextlib
import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from antidreambooth.attack.parametrisation import OwnSize
from antidreambooth.diffusion.backbone import Conditioning
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.photos.regions import face_boxes
from benchmarks import draws, family_memory, first_gpu, gpu_speed, memory, own_size
from benchmarks.aspl_speed import count, multiply, schedule, totals
from benchmarks.counting import Counter, NoModules, cuda_autocast, fake, measured
from benchmarks.host import waits
from benchmarks.phases import PHASES, Mode, Peaks, Round
from benchmarks.phases import count as count_peaks
from benchmarks.published import published
from benchmarks.sharding import Zero
from benchmarks.stable_diffusion import STABLE_DIFFUSION_15, TINY, build, counts, size
from benchmarks.variants import VARIANTS, make_side, make_task
from cli import parsed
from tests.conftest import ROOT

TINY_RUN = argparse.Namespace(tiny=True, photos=3, micro_batch=2)
THOROUGHLY = pytest.param("real-size", marks=[pytest.mark.slow, pytest.mark.thorough])


def test_the_architecture_is_stable_diffusion_15():
    assert counts(build(STABLE_DIFFUSION_15, "meta")) == (859_520_964, 83_653_863, 123_060_480)


def test_the_counter_knows_what_is_held_and_what_is_let_go():
    with fake():
        held = torch.zeros(1000)
        counter = Counter(held)

        def run():
            first = held + 1  # 4000 bytes each
            second = first * 2
            del first
            third = second - 1
            del second, third

        assert counter.held() == 4000
        assert counter.peak(run) == 4000 + 2 * 4000
        assert counter.held() == 4000


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [Mode("", bf16=False), pytest.param(Mode("", checkpointing=True), marks=pytest.mark.thorough)],
    ids=["fp32", "checkpointing"],
)
def test_the_count_agrees_with_the_allocator(mode):
    with fake():
        shapes = Round(TINY, mode, "cpu")
        held, counted = shapes.counter.held(), shapes.peaks()
    assert {"learn 1+1", "PGD 4"} <= set(PHASES)
    real = Round(TINY, mode, "cpu")
    assert real.counter.held() == held
    for phase, run in zip(PHASES, real.phases(), strict=True):
        if phase in ("learn 1+1", "PGD 4"):
            with real.autocast():
                run()  # what is made once
                peak = counted[phase]
                assert peak is not None
                assert peak == real.counter.peak(run)
                work = measured(run)
                # Checkpointing keeps the CPU generator's state, 5 kB, for each block; on a GPU it is 16 bytes.
                states = 40 * torch.get_rng_state().nbytes if mode.checkpointing else 0
                assert abs(peak - held - work) < 0.05 * work + states


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA")
def test_the_cpus_autocast_keeps_for_the_backward_pass_what_cudas_keeps():
    saved = []
    for device in ("cpu", "cuda"):
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage()._cdata] = tensor  # which stays alive, so that numbers are not used again
            return tensor

        with contextlib.ExitStack() as stack:
            stack.enter_context(FakeTensorMode())
            backbone = build(TINY, device)
            image = torch.zeros(1, 3, 16, 16, device=device, requires_grad=True)
            steps = torch.zeros(1, dtype=torch.long, device=device)
            prompt = Conditioning([torch.zeros(1, 77, 16, device=device)])
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # there is no GPU that could choose another one
            if device == "cpu":
                stack.enter_context(cuda_autocast(True))
            else:  # torch.autocast refuses where there is no GPU
                stack.callback(torch.set_autocast_enabled, "cuda", False)
                torch.set_autocast_enabled("cuda", True)
                torch.set_autocast_dtype("cuda", torch.bfloat16)
            latents = backbone.encode(image).mean
            backbone.denoising_loss(latents, steps, torch.zeros_like(latents), prompt)
            torch.clear_autocast_cache()
        saved.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    assert saved[0] == pytest.approx(saved[1], rel=0.01)


def test_zero_shares_out_what_it_says():
    trained, frozen = 1000, 100
    whole = Zero(2, 1, trained, frozen).peak(work=50, learns=True)
    assert whole == 4 * 1100 + (4 + 4 + 8) * 1000 + max(2 * 4 * 1000 + 4 * 1000 + 50, 8 * 1000)
    shared = Zero(2, 4, trained, frozen).peak(work=50, learns=True)
    assert shared == 4 * 1100 + 16 * 250 + 2 * 4 * 1000 + 4 * 250 + 50
    attacked = Zero(3, 4, trained, frozen).peak(work=50, learns=False)
    assert attacked == 4 * 275 + 4 * 1100 + (4 + 4) * 250 + 50
    away = Zero(2, 1, trained, frozen, offload=True)
    assert away.peak(work=50, learns=False) == 4 * 1100 + 50
    assert away.host == 20 * 1000


@pytest.mark.slow
@pytest.mark.thorough
def test_fsdp2_keeps_a_share_and_gathers_a_block():
    encode, single = (memory.count(TINY, Mode("", ranks=ranks)) for ranks in (8, 1))
    assert set(encode) == set(PHASES)
    shared, whole = encode["learn 1"], single["learn 1"]
    assert shared is not None
    assert whole is not None
    assert shared < whole


def test_the_table_says_which_card_is_large_enough(tmp_path):
    peaks: Peaks = {phase: (10 if phase == "PGD 4" else 4) * memory.GIB for phase in PHASES}
    unknown: Peaks = dict.fromkeys(PHASES)
    rows = [memory.Row("some", peaks, "counted"), memory.Row("none", unknown, "measured")]
    text = memory.report(tmp_path, rows, "counted")
    assert [memory.Row("some", peaks, "").fits(card) for card in memory.CARDS] == ["one by one", "yes", "yes"]
    assert rows[1].cells().count("no") == 3
    assert text == (tmp_path / "memory.md").read_text()
    assert len((tmp_path / "memory.csv").read_text().splitlines()) == 3


def test_a_base_model_needs_a_card_that_leaves_room():
    assert family_memory.smallest(7 * memory.GIB) == "8 GB"
    assert family_memory.smallest(7 * memory.GIB + 1) == "12 GB"
    assert family_memory.smallest(80 * memory.GIB) == "none"


@pytest.mark.slow
@pytest.mark.thorough
def test_steps_of_a_base_model_are_counted(tmp_path):
    """Against shared facts: 1.8 GiB of weights with the autoencoder in bf16, 0.2 of texts, 13 to train all of it."""
    plain, again = (family_memory.count("SD 1.5", 512, which) for which in (False, True))
    unet, vae, texts = counts(build(STABLE_DIFFUSION_15, "meta"))
    assert plain.held == again.held
    assert 2 * unet + 4 * vae < plain.held < 2.01 * unet + 4 * vae
    assert 2 * texts < plain.texts < 3 * texts  # embeddings are fp32
    assert plain.full == 16 * unet
    for number in range(2):
        assert again.held < again.peaks[number] < plain.peaks[number]
    assert 0 < plain.four_bits < 2 * unet
    assert plain.texts < plain.start < plain.texts + 2 * unet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family_memory, "count", lambda name, side, again: plain)
        text = family_memory.report(tmp_path, ["SD 1.5"])
    assert text.count("| SD 1.5 ") == len((tmp_path / "memory-families.csv").read_text().splitlines()) - 1 == 9


@pytest.mark.slow
@pytest.mark.thorough
def test_the_published_loop_keeps_three_models_and_looks_at_gradients_of_weights():
    found = {bf16: published(TINY, bf16, cuda=False) for bf16 in (False, True)}
    phases = ("learn 1", "learn 1+1", "PGD 4")
    assert [name for name, peak in found[True].items() if peak] == list(phases)
    with fake():
        backbone = build(TINY)
        learned = 4 * (size(backbone.unet) + size(backbone.text_encoder))
        rest = 4 * size(backbone.vae)
    ours = count_peaks(TINY, Mode("", bf16=False))
    for phase, models in zip(phases, (6, 6, 4), strict=True):  # three models, gradients, in learning two moments
        peak, own = found[False][phase], ours[phase]
        assert peak is not None
        assert own is not None
        assert peak > rest + models * learned
        assert peak > own
    row = memory.Row("published", found[True], "counted", published=True)
    assert row.whole(4) == max(peak for peak in found[True].values() if peak)
    assert row.cells().count("") == 6  # phases that it does not have, one by one, main memory


@pytest.mark.parametrize(("variant", "number"), [("plain", 0), ("fp32", 1)])
def test_operations_are_those_of_a_real_round(variant, number):
    expected = totals(multiply(schedule(make_task(TINY_RUN, "meta")), count(make_task(TINY_RUN, "meta").backbone)))
    task = make_task(TINY_RUN, "cpu")
    side = make_side(VARIANTS[variant], task)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()  # type: ignore[assignment]  # as MemTracker's; its hooks forbid autograd.grad
    with sdpa_kernel(SDPBackend.MATH), counter:
        side.round(task.photos, Turn(0))
    # Where a network learns, the count has a gradient of the latents too much: that of one convolution.
    assert counter.get_total_flops() == pytest.approx(expected[number], rel=2e-3)


def test_a_read_of_a_result_is_found_and_the_engine_has_none():
    assert waits(lambda: torch.zeros(()).item(), "cpu").total() == 1
    task = make_task(TINY_RUN, "cpu")
    side = make_side(VARIANTS["bf16"], task)
    assert not waits(lambda: side.round(task.photos, Turn(0)), "cpu")


def read_table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
@pytest.mark.thorough
def test_the_speed_script_runs_anywhere(tmp_path, capsys):
    gpu_speed.main(
        [
            "--tiny",
            "--rounds=1",
            "--warm-up=0",
            "--variants=plain,channels-last",
            "--profile=channels-last",
            f"--output={tmp_path}",
        ]
    )
    printed = capsys.readouterr().out
    for name in ("operations", "speed", "profile-channels-last"):
        row, *_ = read_table(tmp_path / f"{name}.csv")
        assert all(
            value for column, value in row.items() if column not in ("peak GiB", "reserved GiB")
        )  # which a CPU does not tell
        assert (tmp_path / f"{name}.md").read_text() in printed
    assert {row["variant"] for row in read_table(tmp_path / "speed.csv")} == {"plain", "channels-last"}


def test_the_speed_script_names_the_variants_it_knows(capsys):
    with pytest.raises(SystemExit):
        gpu_speed.main(["--tiny", "--variants=fastest"])
    assert "cuda-graphs" in capsys.readouterr().err


def test_a_variant_that_fails_costs_the_others_nothing(tmp_path, capsys, monkeypatch):
    def tried(variant, name, args):
        if name == "recorded":
            raise RuntimeError("no compiler")
        return gpu_speed.Result([2.0], 3.0, 0, 0, [1.0], {}, graphs=5)

    monkeypatch.setattr(gpu_speed, "try_out", tried)
    arguments = ["--tiny", "--variants=recorded,bf16", "--schedule=12", f"--output={tmp_path}"]
    assert [*gpu_speed.main(arguments)] == ["bf16"]
    assert "recorded failed, the others go on: no compiler" in capsys.readouterr().out
    (row,) = read_table(tmp_path / "speed.csv")
    assert row["s for 12, warm-up included"] == "23.0"  # two rounds of warm-up in 3 s, ten of 2 s
    assert row["graphs"] == "5"
    with pytest.raises(RuntimeError, match="no compiler"):
        gpu_speed.main(["--tiny", "--variants=recorded", f"--output={tmp_path}"])


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Parts of the script for the first GPU that succeed, fail, hang, and find something else than we claim."""
    (tmp_path / "tables").mkdir()
    programs = {
        "fine": "print('> halfway'); write([{'what': 'water is wet', 'found': 'it is', 'holds': True}])",
        "fails": "print('some words'); raise ValueError('no such kernel')",
        "hangs": "import time; time.sleep(60)",
        "other": "write([{'what': 'it is fast', 'found': 'it is slow', 'holds': False}])",
    }
    write = "import json, pathlib\ndef write(claims): pathlib.Path({!r}).write_text(json.dumps(claims))\n"
    monkeypatch.setattr(
        first_gpu, "PARTS", {name: first_gpu.Part("", 2 if name == "hangs" else 30) for name in programs}
    )
    args = argparse.Namespace(work=tmp_path, limit=60.0)
    return first_gpu.Runner(
        args, lambda name: [sys.executable, "-c", write.format(str(tmp_path / f"{name}.json")) + programs[name]]
    )


@pytest.mark.parametrize("together", [False, True])
def test_a_part_that_fails_or_hangs_costs_the_others_nothing(stand_ins, tmp_path, together, capsys):
    parts = {name: replace(part, alone=not together) for name, part in first_gpu.PARTS.items()}
    outcomes = first_gpu.run_all(parts, stand_ins, together)
    line = first_gpu.report(outcomes, tmp_path / "tables", "a card")
    printed = capsys.readouterr().out
    assert "fine: halfway" in printed
    assert "| ValueError: no such kernel" in printed
    assert line.startswith(
        "3 disagree with what we claim: fails: exit code 1: ValueError: no such kernel; hangs: killed"
    )
    assert line.endswith("other: it is fast: it is slow")
    table = (tmp_path / "tables" / "claims.md").read_text()
    assert "water is wet" in table
    assert table.count("| yes |") + table.count("|   yes |") == 1


def test_what_would_start_after_the_limit_is_not_started(stand_ins, tmp_path):
    stand_ins.args.limit = 1.0
    outcomes = first_gpu.run_all({"fine": first_gpu.PARTS["fine"]}, stand_ins, together=False)
    assert outcomes["fine"].failure == "not started: the 1 s of --limit are used up"
    assert first_gpu.report({}, tmp_path, "a card") == "nothing disagrees with what we claim"


@pytest.mark.parametrize("name", ["machine", "victim-full", "distance", THOROUGHLY, "profile"])
def test_a_part_of_the_script_for_the_first_gpu_runs_anywhere(tmp_path, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = first_gpu.parse(["--tiny", f"--work={tmp_path / 'work'}"])
    first_gpu.run_part(name, args)
    claims = json.loads((tmp_path / "work" / f"{name}.json").read_text())
    assert all(claim["holds"] for claim in claims), claims
    assert len(claims) == {"machine": 0, "victim-full": 2, "distance": 1, "real-size": 2, "profile": 0}[name]


def test_a_curve_is_read_between_its_points():
    curve = [(0.0, 1.0), (10.0, 3.0), (20.0, 3.5)]
    assert [draws.at(curve, when) for when in (0, 5, 10, 16, 30)] == [1.0, 2.0, 3.0, 3.3, 3.5]
    assert [draws.reached(curve, loss) for loss in (1.0, 2.0, 3.25, 4.0)] == [0.0, 5.0, 15.0, float("inf")]


def test_time_to_equal_loss_is_a_share_of_the_time_of_one_draw(tmp_path):
    (tmp_path / "draws-time.csv").write_text("draws,median x\n1,1.0\n2,1.5\n")
    rows = [(1, 0, 0.0), (1, 30, 0.3), (2, 0, 0.0), (2, 10, 0.3), (2, 20, 0.45)]  # of two draws 15 and 30 times one
    lines = [f"fixed,sign,{number},1,0,{steps},{loss}" for number, steps, loss in rows]
    (tmp_path / "draws-losses.csv").write_text("\n".join([",".join([*draws.Key._fields, "steps", "loss"]), *lines]))
    draws.main(["compare", f"--output={tmp_path}"])
    one, two = read_table(tmp_path / "draws.csv")
    assert (one["loss"], two["loss at half-time"], two["loss"]) == ("0.3000", "0.3000", "0.4500")
    assert two["rise, % more"].startswith("+50.0 ")
    assert two["time to equal loss"].startswith("0.50 ")


@pytest.mark.slow
def test_the_script_on_draws_runs_from_photos_to_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(draws, "YARDSTICK", 2)
    monkeypatch.setattr(draws, "HELD_OUT", 2)
    where = ["--draws", "1", "2", f"--output={tmp_path}"]
    draws.main(["time", "--steps=1", "--repeats=1", *where])
    losses = ["losses", str(ROOT / "examples" / "photos"), "--budget=2", "--points=1", *where]
    for flags in ([], ["--alternating", "--rule=momentum"], []):  # the second time there is nothing left to do
        draws.main([*losses, *flags])
    assert len(read_table(tmp_path / "draws-losses.csv")) == 2 * 2 * 2
    draws.main(["compare", f"--output={tmp_path}"])
    assert [row["attack"] for row in read_table(tmp_path / "draws.csv")] == ["ASPL, momentum"] * 2 + ["fixed, sign"] * 2


def test_portraits_are_put_into_larger_photos_and_read_as_trainers_do(tmp_path):
    portraits = tmp_path / "people" / "ann" / "set_B"
    portraits.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "photos" / "obama-1.jpg", portraits / "one.jpg")
    ann = own_size.Person(tmp_path / "people", "ann", tmp_path / "out")
    (photo,) = ann.photos("set_B").iterdir()
    with Image.open(photo) as image:
        assert image.size == own_size.SIZE
        assert len(face_boxes(image.convert("RGB"))) == 1
    squares = {name: ann.squares(ann.photos("set_B"), reading) for name, reading in own_size.READINGS.items()}
    assert {name: len(found) for name, found in squares.items() if len(found) != 1} == {"random crop": 3}
    assert all(found.shape[1:] == (3, 128, 128) for found in squares.values())
    assert (squares["face"].float() - squares["bilinear"].float()).abs().mean() > 10
    perturbation = torch.full((1, 3, 128, 128), 6.0)
    changed = ann.squares(ann.write("six", ann.enlarged(perturbation)), own_size.READINGS["bilinear"])
    assert (changed.float() - squares["bilinear"].float()).mean() == pytest.approx(6, abs=0.2)


def test_each_way_of_a_cloak_is_the_same_in_both_parts():
    for name, way in own_size.WAYS.items():
        if way is not None:
            settings = parsed(["fit", f"--config={ROOT / 'configs' / 'aspl.yaml'}", *way.flags])
            chosen = settings.model.init_args.parametrisation
            assert chosen.class_path.rpartition(".")[2] == type(way.parametrisation).__name__, name
            assert settings.data.init_args.region.widths == way.region.widths
            if isinstance(way.parametrisation, OwnSize):
                assert chosen.init_args.oversampling == way.parametrisation.oversampling
                assert chosen.init_args.views.close == way.parametrisation.views.close
