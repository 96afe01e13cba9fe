"""How fast engines are: latency, text throughput, servers under load, and the fastest backend here."""
