"""The checkers of the notebooks' exercises, one file a notebook."""
