"""Rotary positions: an op, and the form of it that models call."""
from .into import rotary_into, rotary_into_default
from .op import rotary

__all__ = ["rotary", "rotary_into", "rotary_into_default"]
