"""Anti-DreamBooth (arXiv:2303.15433): perturb photos so that what is fine-tuned on them comes out useless."""

import os

# Nothing about a run leaves the machine. Read by the hub's client when it is imported, hence here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
