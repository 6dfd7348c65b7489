"""The measurements of the notebooks: base networks, sweeps, runs, trials, benchmarks."""
