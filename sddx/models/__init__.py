"""Loading models, where their parts are in each family, decoding."""
