"""What is counted and measured: speed, memory, scaling; each script says at its top how it is run."""
