"""Causal attention in one order over absolute positions, which prefill, chunks, verification and decode share."""
from .op import attention_chunk, attention_decode, attention_prefill
from .sequences import Sequences

__all__ = ["Sequences", "attention_chunk", "attention_decode", "attention_prefill"]
