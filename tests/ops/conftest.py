"""Puts this folder on the path, so that tests here and in folders below find `common` and `reference`."""
