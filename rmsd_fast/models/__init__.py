"""Students: loading, freezing, forward passes on padded rows, export; and a tiny one built offline."""
