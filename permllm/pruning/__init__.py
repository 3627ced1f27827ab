"""One-shot pruning: scores, updates, linear groups, whole models."""
