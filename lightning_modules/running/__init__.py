"""How Lightning runs the modules: strategies, sharding, borrowed weights, preemption, checkpoints."""
