"""The synthetic world: people who speak and move, every factor of whom is a known number."""
