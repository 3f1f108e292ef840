"""What will go wrong with an installation or a recipe, before it does."""
