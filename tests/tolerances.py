"""Every tolerance that a test compares with, each with the line that derives it."""

LOSS_FLOAT64 = 1e-12
"""Mean float64 cross-entropies summed in two orders: a few dozen terms of size below 10, each with error 1e-15."""

MEAN_OF_RATIOS = 1e-12
"""Means of a few float64 quotients of whole numbers, each right to 1e-16."""

TRAINED_FLOAT64 = 1e-11
"""Float64 weights after some twenty steps of size 0.05: sums in another order, 1e-16 each, grown 1e4-fold at most."""
