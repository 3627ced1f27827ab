"""Text, token sequences and the statistics of activations."""
