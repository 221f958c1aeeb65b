"""What `benchmarks.quality` and `benchmarks.attack` measure with."""
