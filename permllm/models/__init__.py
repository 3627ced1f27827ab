"""Model families, checkpoints and loading: the only place that names a family."""
