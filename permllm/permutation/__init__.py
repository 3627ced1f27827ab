"""Channel orders: values, relaxations, assignments, learnable ones and heuristics."""
