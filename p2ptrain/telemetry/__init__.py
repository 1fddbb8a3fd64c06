"""A peer's eyes: metrics for operators, a journal for whoever comes later, and the pages that serve them."""
