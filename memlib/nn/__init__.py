"""What every transformer has: attention, norm, rotary positions, feed-forward, and points to listen at."""
