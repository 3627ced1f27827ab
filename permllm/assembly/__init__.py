"""Checkpoints that a pruned model leaves."""
