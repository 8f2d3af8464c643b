"""Loading models, telling them apart, and scoring tokens with them."""
