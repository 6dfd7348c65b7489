"""What the notebooks measure: base networks, sweeps, runs, trials, benchmarks."""
