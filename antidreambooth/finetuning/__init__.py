"""How a base model learns a person; the surrogate and the victim alike."""

from antidreambooth.finetuning.adaptation import Adaptation, Untrained
from antidreambooth.finetuning.cross_attention import CrossAttention
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.lora import LoRA
from antidreambooth.finetuning.textual_inversion import TextualInversion

# A class name on the command line resolves to what is imported, so each way to adapt a model stands here.
__all__ = ["Adaptation", "CrossAttention", "Full", "LoRA", "TextualInversion", "Untrained"]
