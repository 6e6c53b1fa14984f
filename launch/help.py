"""What ``python cli.py`` and each command's ``--help`` say first: what it is for, and an example to start from."""

from __future__ import annotations

from jsonargparse import DefaultHelpFormatter

WELCOME = """\
Cloaks photos, so that DreamBooth and LoRA learn little from them, and measures whether that held.

  python cli.py fit      cloak photos, or train an attacker on photos
      python cli.py fit -c configs/aspl.yaml --data.photos ~/me --trainer.default_root_dir outputs/me
      python cli.py fit -c configs/dreambooth.yaml --data.photos outputs/me/cloaked
  python cli.py test     have the trained attacker draw the person, and measure how much of the person is in it
      python cli.py test -c configs/dreambooth.yaml --data.reference_photos ~/me
  python cli.py people   cloak the photos of many people, each in a folder of their own
      python cli.py people -c configs/people.yaml --folder FOLDER
  python cli.py verdict  train attackers on photos under every protection and condition, and compare them
      python cli.py verdict --photos outputs/me/cloaked --clean_photos FOLDER
  python cli.py fragility   how far can the autoencoder of a base model be fooled at all? Within minutes
      python cli.py fragility --backbone NAME
  python cli.py page     open a page in the browser, on this machine only, where all of this needs no further commands

The jobs are in configs/, with settings for machines in configs/trainer/ and experiments in configs/verdict/.
Each command explains itself with --help, and README.md tells the story from the start.
"""

FIT = """\
Runs the job that a config file describes: cloaking photos, or training an attacker on them.

  python cli.py fit -c configs/aspl.yaml                          the example photos, with the small model
  python cli.py fit -c configs/aspl.yaml --data.photos ~/me --trainer.default_root_dir outputs/me
  python cli.py fit -c configs/aspl.yaml --data.photos ~/me --dry_run     how much time, memory and disk it will take
  python cli.py fit -c configs/aspl.yaml --trainer.default_root_dir outputs/me --ckpt_path last     resume
  python cli.py fit -c configs/aspl.yaml -c configs/trainer/low-memory.yaml                         a small GPU
  python cli.py fit -c configs/dreambooth.yaml --data.photos outputs/me/cloaked                     an attacker

What a job can be told:
  --model.help ASPL         the settings of a method (FSMG, Victim, Pretraining): budget, rounds, surrogate ...
  --data.help Protection    which photos (Subject: those of an attacker)
  --print_config            what would run, with every setting; nothing is run
  --trainer.max_epochs N    rounds of a cloaking run
  --seed_everything N       the same seed gives the same result

All flags of Lightning's trainer follow.
"""

TEST = """\
Has a trained attacker draw the person, and measures how much of the person is in the pictures.

  python cli.py test -c configs/dreambooth.yaml --data.reference_photos ~/me

Give the same config and the same --trainer.default_root_dir as to `fit`. It writes images/, per_image.csv, grid.png and
measures.json there. --model.help Victim explains the settings, such as --model.generation.images.

All flags of Lightning's trainer follow.
"""

PEOPLE = """\
Cloaks the photos of many people: each has a folder in --folder, and a run of their own, shared out over workers.

  python cli.py people -c configs/people.yaml --folder FOLDER --dry_run       who is left to do, and how much disk
  python cli.py people -c configs/people.yaml --folder FOLDER
  python cli.py people --folder FOLDER --protection 'configs/aspl.yaml --model.budget 4' --output outputs/four

Run the same command again to continue after an interruption and to retry whoever failed. Whoever is done is skipped.
"""

VERDICT = """\
Are these photos protected, and against what? Trains attackers on photos under every protection, and compares them.

  python cli.py verdict --photos outputs/me/cloaked --clean_photos FOLDER                  your own cloaked photos
  python cli.py verdict -c configs/verdict/main.yaml --people_folder FOLDER --dry_run      how much there is to do
  python cli.py verdict -c configs/verdict/main.yaml --people_folder FOLDER

  python cli.py verdict -c configs/verdict/main.yaml --people_folder FOLDER --protections mist=THEIRS

The last one also judges photos that another tool has cloaked: THEIRS holds a folder for each person, PERSON/set_B or
PERSON, with a photo of the same file stem (IMG_1.png of IMG_1.jpg) and the same size for each one of theirs.

Run the same command again to continue after an interruption: what is finished is kept.
"""

FRAGILITY = """\
How far can the autoencoder of a base model be fooled at all? Loads it alone, and takes a minute with the small model.

  python cli.py fragility                                                    the small model, the example photos
  python cli.py fragility --backbone stable-diffusion-v1-5/stable-diffusion-v1-5 --photos ~/me

A latent diffusion model sees a photo as its autoencoder shows it. For each budget the photos are changed as strongly as
an attack on the encoder can, in two ways: `away`, the latent away from the clean photo's, and `grey`, toward that of a
grey picture. Then it measures what remains of the change:

  latent moved       how far, as a share of the mean distance between two of the photos
  left to grey       the distance to grey that is left, as a share of what it was
  decoded moved      what the decoder gives back against what it gives back of the clean photo: root mean square, in
                     steps of 255
  decoded off        the same against the photo that went in; its first row is how much the autoencoder blurs anyway
  LPIPS of that      the same as people see it, where its weights are in torch's cache

A faithful autoencoder gives back the changed photo itself: `decoded off` stays near its first row, and a protection has
to be something that the denoiser cannot learn. An unfaithful one shows a model another picture than people see.

It prints a table, and writes table.md, table.csv, comparison.png and manifest.json to --output.
"""

USAGE = {
    "fit": "python cli.py fit -c CONFIG [-c CONFIG ...] [--FLAG VALUE ...]",
    "test": "python cli.py test -c CONFIG [-c CONFIG ...] [--FLAG VALUE ...]",
    "people": "python cli.py people [-c CONFIG] --folder FOLDER [--FLAG VALUE ...]",
    "verdict": "python cli.py verdict [-c CONFIG] [--FLAG VALUE ...]",
    "fragility": "python cli.py fragility [--backbone NAME] [--photos FOLDER] [--FLAG VALUE ...]",
}


class Help(DefaultHelpFormatter):
    """Leaves a description's lines as they are, so that examples can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Argparse's own hook, as its RawDescriptionHelpFormatter uses it."""
        return "".join(indent + line for line in text.splitlines(keepends=True))
