"""One trial in one process on one device, watched: locks, devices, environment, the child."""
