"""Networks outside of training: runtimes, export, time, and what bounds it."""
