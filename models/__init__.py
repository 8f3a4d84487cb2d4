"""Reference models: used by the demo, by benchmarks and by tests only."""
