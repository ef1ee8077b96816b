"""Every tolerance that a test compares with, each with the line that derives it."""

LOSS_FLOAT64 = 1e-12
"""Mean float64 cross-entropies summed in two orders: a few dozen terms of size below 10, each with error 1e-15."""

MEAN_OF_RATIOS = 1e-12
"""Means of a few float64 quotients of whole numbers, each right to 1e-16."""

TRAINED_FLOAT64 = 1e-11
"""Float64 weights after some twenty steps of size 0.05: sums in another order, 1e-16 each, grown 1e4-fold at most."""

RANK_BAND = 0.25
"""Of 1 / max(H, W)^2: ranks may differ where some |s / t - 1| is below. A squared singular value has to be right to
t^2 / (2 n^2) = 2^-47 sigma_max^2, 64 units of float64's rounding, which Gram matrix and factorisation share."""

COMPACTED_FLOAT64 = 1e-10
"""Slim against masked in float64, over max(1, max |masked|): sums of up to 1e5 terms in another order, 1e-16 each,
through a dozen layers."""

HAND_ROUNDED = 6e-6
"""Values worked out by hand are written to five decimals: half a unit of the fifth, and a little."""

SILHOUETTE_ROUNDING = 1e-13
"""Mean silhouettes of rows scaled to [0, 1] by two formulas: a few dozen float64 operations on numbers below 10."""

FROZEN_LOGITS = 1e-6
"""Float32 logits of about 0.1, sums of 36 products in an order that machines choose: 40 units in the last place."""

NULL_MEAN = 0.002
"""Mean similarity of 32,640 pairs of 256 random kernels with 64 channels: five standard deviations over seeds, measured
as 0.0004; five times as much with one channel."""

SCORE_INTERVAL = 1e-12
"""Ends of a Wilson interval by two formulas: a dozen float64 operations on numbers below 2."""

SSIM_GATE = 1e-6
"""Psi against float64: 17 units of float32's rounding (2^-24). A psi takes some twenty roundings, and three
approximations of up to two units each on a GPU, which rarely all point one way; the mean over channels
evens them out."""

SSIM_FLOAT64 = 1e-13
"""Psi in float64 lanes: some thirty roundings of 1e-16, and logarithms right to 1e-15 times exponents below ten."""

STATISTICS = 1e-12
"""Means and variances of at most a few hundred float64 numbers below 10, summed in two orders: 1e-15 each."""

CONSTANT_CHANNEL = 1e-9
"""Spread of a channel that does not vary, over max(1, its largest value): float64 sums of up to 1e4 equal terms in
another order at the border, 1e-16 each; a channel that varies spreads over more than 1e-3."""

CRITERION_FLOAT64 = 1e-12
"""Norms, distances and statistics of at most a hundred float64 numbers below 10, by two formulas: 1e-15 each."""

QUADRATURE = 1e-7
"""What numeric integration of a smooth density promises by default is 1.5e-8; a little more for kinks at zero."""

TABLE_ROUNDED = 5e-5
"""Half a unit of the fourth decimal, to which the numbers are given."""
SILHOUETTE_GATE = 1e-9
"""Silhouettes from one matrix of distances against distances from differences: what the kernel promises. Both take sums
of at most a few hundred float64 numbers, 1e-16 each."""

INERTIA = 1e-12
"""Of rows times the squared diagonal of their box: inertia by sums of pairs against differences from the mean, a few
hundred float64 operations; rows far from the origin lose what their offset takes, 2^20 of 2^53 squared in the test."""
