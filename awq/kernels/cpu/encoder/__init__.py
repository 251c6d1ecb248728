"""A whole text encoder as one native program: see `program`."""
