"""The paper's experiments and their successors, each a short file that calls the package."""
