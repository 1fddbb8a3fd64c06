"""What the main loop is made of, each with one thing to see to: see `trainer`, which puts them together."""
