"""The verdict in sentences; none of them may promise safety."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from antidreambooth.evaluation.judgement import RECOGNISED, Group, Setting, Status, setting_of
from antidreambooth.evaluation.results import Result, percent

CHANCE = 0.1  # a verifier that takes more pictures of nobody for the person is too lenient
FEW = 5  # people, below which an interval over people is a sketch

STANDS_FOR = (  # of the embedded base model
    "The small model's autoencoder keeps one number for twelve of a picture's values, as those of Stable Diffusion 3 "
    "and FLUX do; those of Stable Diffusion 1, 2 and XL keep one for forty-eight, and there a change of the same size "
    "moves far more. So what is shown here stands for models of the first kind: for any other, `python cli.py "
    "fragility --backbone NAME` shows within minutes how far its autoencoder can be fooled."
)

_OPEN = (
    "This is what happened in these trials and no more: another model, longer training, other ways to clean the "
    "photos, or one unprotected photo elsewhere can turn out differently. Nothing here says that a photo is safe."
)


def answer(groups: Iterable[Group]) -> list[str]:
    """Two plain sentences: in how many settings protection held, and where it was weakest and strongest."""
    judged = [group for group in groups if not group.is_control]
    known = [group for group in judged if group.status is not Status.UNJUDGED]
    if not judged:
        return ["No protection has been measured yet."]
    if not known:
        return [f"No verdict: {'; '.join(sorted({reason for group in judged for reason in group.lacking}))}."]
    held = sum(group.status is Status.HELD for group in known)
    unjudged = f", {len(judged) - len(known)} could not be judged" if len(known) < len(judged) else ""
    counts = f"of {_settings(len(judged))} tried, protection held in {held} and not in {len(known) - held}{unjudged}"
    ranked = sorted(known, key=lambda group: -group.figures["acceptance"].mean)
    strongest = f"; the strongest {_recognised(ranked[-1])}" if len(ranked) > 1 else ""
    return [f"{_verdict(held, len(known))}: {counts}.", f"The weakest was {_recognised(ranked[0])}{strongest}."]


def warnings(groups: Sequence[Group], finished: int, expected: int, failed: int) -> list[str]:
    """What has to be known before any number is read, loudest first."""
    found = []
    for group in groups:
        acceptance, name = group.figures.get("acceptance"), group.setting
        where = name.victim if name.condition == "nothing" else f"{name.victim} after {name.condition}"
        if name.protection == "none" and acceptance and acceptance.mean < RECOGNISED:
            found.append(
                f"The victim {where} is too weak to judge protections: it draws even unprotected people recognisably "
                f"in only {percent(acceptance.mean)} of its pictures, less than {percent(RECOGNISED)}."
            )
        if name.protection == "base" and acceptance and acceptance.mean > CHANCE:
            found.append(
                f"The verifier takes {percent(acceptance.mean)} of the pictures by a model that has seen nobody for "
                "the person: acceptance says less about recognition than it seems to."
            )
    if finished < expected:
        errors = f", {failed} failed" if failed else ""
        found.append(
            f"Unfinished: {finished} of {expected} cells finished{errors}. Every number here may still change."
        )
    people = max((interval.people for group in groups for interval in group.figures.values()), default=0)
    if people == 1:
        found.append("Only one person: intervals speak about seeds and pictures, not about other people.")
    elif 0 < people < FEW:
        found.append(f"Only {people} people: read the intervals as a sketch, they are too narrow.")
    return found


def of_blanks(cells: Iterable[Result]) -> list[str]:
    """That some victims drew nothing, which the measures cannot tell from a picture without a face."""
    blank = [cell for cell in cells if cell.blank]
    if not blank:
        return []
    count, drawn = sum(cell.blank for cell in blank), sum(len(cell.files) for cell in blank)
    return [
        f"{count} of {drawn} pictures of {len(blank)} cells ({blank[0].name} is one) have one colour all over: there a "
        "victim drew nothing, which is no protection, and counts as no face."
    ]


def paragraph(cells: Sequence[Result]) -> str:
    """The verdict for one person's photos, in counted pictures: what was tried, what came of it, what stays open."""
    people = ", ".join(sorted({cell.person for cell in cells}))
    settings = sorted({setting_of(cell) for cell in cells}, key=lambda setting: setting.order)
    counted = {setting: count_recognised(cell for cell in cells if setting_of(cell) == setting) for setting in settings}
    if not any(total for _, total in counted.values()):
        return f"Nothing can be said about the photos of {people}: in no picture was it measured whose face it shows."
    trained = [cell for cell in cells if cell.protection != "base"]
    attacks = list(dict.fromkeys((s.victim, s.condition) for s in settings if s.protection != "base"))
    sentences = [f"To learn the face of {people}, {len(trained)} models were trained on their photos."]
    sentences += [_outcome(attack, counted) for attack in attacks]
    for setting, found in counted.items():
        if setting.protection == "base":
            sentences.append(f"A model that had seen nobody drew that face in {_of(found)}.")
        if setting.protection == "none" and found[0] < RECOGNISED * found[1]:
            sentences.append(f"{_attack(setting).capitalize()} is too weak an attack to prove protection.")
    return " ".join([*sentences, _OPEN])


def count_recognised(cells: Iterable[Result]) -> tuple[int, int]:
    """In how many of how many pictures the face was the person's."""
    values = [cell.values["acceptance"] for cell in cells if "acceptance" in cell.values]
    return int(sum(np.nansum(v) for v in values)), int(sum(np.count_nonzero(~np.isnan(v)) for v in values))


def _outcome(attack: tuple[str, str], counted: Mapping[Setting, tuple[int, int]]) -> str:
    ours = [setting for setting in counted if (setting.victim, setting.condition) == attack and counted[setting][1]]
    known = {"none": "unprotected photos", "cloaked": "cloaked photos"}
    counts = [f"{_of(counted[s])} from {known.get(s.protection, f'photos with {s.label}')}" for s in ours]
    return f"With {_attack(ours[0])}, the face was still theirs in {', and in '.join(counts)}."


def _attack(setting: Setting) -> str:
    return setting.victim if setting.condition == "nothing" else f"{setting.victim} after {setting.condition}"


def _of(found: tuple[int, int]) -> str:
    return f"{found[0]} of {found[1]} pictures"


def _settings(count: int) -> str:
    return "1 setting" if count == 1 else f"{count} settings"


def _verdict(held: int, known: int) -> str:
    if not held:
        return "Not protected against anything tried here"
    return "Partly protected" if held < known else "Protection held against what was tried here"


def _recognised(group: Group) -> str:
    acceptance = group.figures["acceptance"]
    interval = f"95 % interval {percent(acceptance.low)} to {percent(acceptance.high)}"
    without = f"; unprotected {percent(group.unprotected.mean)}" if group.unprotected else ""
    return f"{group.setting}, still recognised in {percent(acceptance.mean)} of pictures ({interval}{without})"
