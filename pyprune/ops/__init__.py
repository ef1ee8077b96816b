"""The kernels: one stem per operation, each with a pure chooser, a float64 reference and its variants."""
