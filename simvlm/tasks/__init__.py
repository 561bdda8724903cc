"""The paper's benchmarks: readers of their official files, and the generated world in the same formats."""
