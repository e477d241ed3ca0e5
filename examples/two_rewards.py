import torch

from marble_core import alignment, combine_rows, gram_matrix, harmonize

# One gradient a reward: they conflict, one is longer.
rows = {"weight": torch.tensor([[10.0, 0.0], [-0.6, 0.8]])}
gram = gram_matrix(rows)
balanced = harmonize(gram)

print("cosines of the sum:     ", alignment(gram, torch.ones(2)).cosines.float())
print("cosines after balancing:", balanced.cosines.float())
print("direction:", combine_rows(rows, balanced.coefficients)["weight"])
