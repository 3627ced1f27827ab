"""New values for the weights that pruning keeps, and masks chosen for them: pure functions of one linear group's tensors.

Every update is a function (weight, stats, pattern, mask) -> (new weight, mask). The weight holds the rows of all linears
of the group, so that its Gram matrix is factorised once; mask is what the method's score keeps: some updates hold it
fixed, some begin from it, some choose their own, and none ends with a larger output error.
"""
