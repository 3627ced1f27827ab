"""Learnable channel permutations (LCP), PermLLM (NeurIPS 2025)."""
