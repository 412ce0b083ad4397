"""Discovery of backends, the hooks that they implement, and the one that the core brings itself."""
