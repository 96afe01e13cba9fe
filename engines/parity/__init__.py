"""Does an engine compute what its checkpoint computes? Comparison, probes, tolerances, gates, bisection."""
