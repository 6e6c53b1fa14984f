"""What Anti-DreamBooth is: the round, the perturbation, what it climbs, and against whom."""
