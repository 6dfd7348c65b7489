"""Networks outside of training: runtimes, export, and time."""
