"""Fixtures of this folder's files."""
from playing import attention, gpu  # noqa: F401
