"""Places where a converted model runs; the reference engine computes in integers."""
