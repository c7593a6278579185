"""What benchmarks, demo and GPU check share: servers, arms, tasks and rows. Measures nothing."""
