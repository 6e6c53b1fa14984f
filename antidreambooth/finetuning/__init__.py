"""How a base model learns a person; the surrogate and the victim alike."""
