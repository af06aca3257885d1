"""Speed of the complete QUAD layers beside what they replace; see README.md in this folder."""
