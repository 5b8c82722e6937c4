"""The mathematics: which numbers, how far they reach. It knows torch and numpy, and no host."""
