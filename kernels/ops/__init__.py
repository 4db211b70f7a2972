"""One op, one file, or a folder with the same words: order, cuda, python, triton."""
