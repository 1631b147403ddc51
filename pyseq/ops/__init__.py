"""One module per op: the contract. Schema, shapes, gradient, argument errors, and the public functions."""
