"""What a run leaves behind: run directory, metrics, samples, progress, phase times and the HTML report."""
