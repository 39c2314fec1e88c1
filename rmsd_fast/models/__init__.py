"""Students: loading, freezing, forward passes on rows, and export."""
