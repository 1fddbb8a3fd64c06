"""p2ptrain: train one model together, over the internet, with nothing in the middle."""

__version__ = "0.1.0"
PROTOCOL_VERSION = 10
