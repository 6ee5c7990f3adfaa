"""Everything that judges: metrics, evaluation, real and synthetic mouths, speed, ablations, pictures."""
