"""The work of a step on several processes, which accelerate's launcher starts."""
