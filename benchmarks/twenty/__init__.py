"""How far CART goes with the number of tasks: up to twenty image encoders merged."""
