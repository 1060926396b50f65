"""How far a student moved from the model that it was cut from, and how far its data was from that model."""
