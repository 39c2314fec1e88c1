"""Students: loading, freezing, forward passes on padded rows, export."""
