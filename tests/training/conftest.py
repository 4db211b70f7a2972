"""Puts this folder on the path, so that its tests find `backward_cases` and `trained`."""
