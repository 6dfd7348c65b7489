"""Networks outside training: runtimes, export, time, and its lower bounds."""
