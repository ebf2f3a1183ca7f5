"""What we say: `render(study)` a format; every figure comes from loadgen, a report places it."""
