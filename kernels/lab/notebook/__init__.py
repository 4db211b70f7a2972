"""What a notebook's cells use, and how notebooks are run and checked."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "cells": ["begin", "check", "observe", "show", "show_source", "show_texts"],
    "exercises": ["exercise", "grade", "progress"],
})
