"""Read and explain what main.py wrote. Everything here runs on a CPU."""
