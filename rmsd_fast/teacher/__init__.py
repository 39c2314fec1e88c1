"""The black-box teacher: its pool of responses, and the statistics of the pool."""
