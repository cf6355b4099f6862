"""What a test or a benchmark of low-rank kernels needs: error rules, hard inputs, timing."""
