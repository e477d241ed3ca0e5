import torch

from marble_core import alignment, combine_rows, gram_matrix, harmonize

# One gradient per reward along the first dimension of each leaf. These two conflict, and the first is ten times longer.
rows = {"weight": torch.tensor([[10.0, 0.0], [-0.6, 0.8]])}

gram = gram_matrix(rows)
before = alignment(gram, torch.ones(2))  # the plain sum of the two
balanced = harmonize(gram)
after = alignment(gram, balanced.coefficients)
direction = combine_rows(rows, balanced.coefficients)

print("cosines of the sum:      {:+.3f} {:+.3f}".format(*before.cosines.tolist()))
print("cosines after balancing: {:+.3f} {:+.3f}".format(*after.cosines.tolist()))
print("direction:", direction["weight"])
