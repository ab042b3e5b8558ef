"""CREPE tiny, a pitch tracker, made to fit a share of its measured latency."""
