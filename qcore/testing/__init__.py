"""Tools for authors of backends: checks that say when a backend is right."""
