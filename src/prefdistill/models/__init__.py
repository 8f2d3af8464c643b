"""Load and identify models, and score tokens with them."""
