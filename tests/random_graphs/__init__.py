"""Random models and what must hold for each: see ``generate.py`` and ``checks.py``."""
