"""A trainer whose every sum has an order: backward passes, an optimizer, and the text that the byte model learns."""
