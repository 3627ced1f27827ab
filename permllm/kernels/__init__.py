"""What runs a permuted or sparse product fast, where the machine has it."""
