"""N:M patterns and masks."""
